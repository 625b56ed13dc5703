"""The leader inside a C++ program: examples/embed, built and run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import drp
from tests.cpp_build import build

EXPECTED = """\
refused: ValueError: steps is 0; give a whole number, 1 to 10000
refused: ValueError: steps is 0; give a whole number, 1 to 10000
4 threads, 12 runs: 0 failed, 0 copied, 0 differ from drp.reference
4 threads, 12 runs: 0 failed, 0 copied, 0 differ from drp.reference
settings, child processes, descriptors: as before
signal handlers: as before
logged: """


pytestmark = [pytest.mark.cpp, pytest.mark.timeout(400)]  # the first test builds


def test_a_leader_in_a_cpp_program(tmp_path: Path) -> None:
    program = str(build("examples/embed") / "embed")
    # In the one Python knows its environment's interpreter; in the other it takes the program itself for one.
    python_path = os.pathsep.join([str(Path(drp.__file__).parent.parent), *filter(None, sys.path)])
    starts: list[tuple[list[str], dict[str, str]]] = [
        ([program, sys.executable], {}),
        ([program], {"PYTHONPATH": python_path}),
    ]
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **env, "TMPDIR": str(tmp_path)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, env in starts
    ]
    try:
        for process in running:
            out, err = process.communicate(timeout=100)
            assert (process.returncode, err) == (0, ""), out
            assert re.fullmatch(re.escape(EXPECTED) + r"[1-9]\d* records, the first: .* drp\.leader.*\n", out), out
    finally:
        for process in running:
            process.kill()
            process.communicate(timeout=10)
    assert list(tmp_path.iterdir()) == []


def test_the_example_links_nothing_of_torch() -> None:
    program = build("examples/embed") / "embed"
    linked = subprocess.run(["ldd", str(program)], check=True, capture_output=True, text=True, timeout=10).stdout
    assert "libpython" in linked
    assert "torch" not in linked
