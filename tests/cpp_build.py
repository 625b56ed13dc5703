"""Builds the C++ parts for tests. Without the tools a user's machine skips those; CI, which installs all, fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parent.parent
DEADLINE = 300.0
FLAGS = "-O1 -Wall -Wextra -Wpedantic -Werror"


def build(source: str) -> Path:
    """Build the CMake project in a folder of this repository, warnings being errors; return where its programs are.

    What is built stays in `build/`, and is only built again when it has changed.
    """
    for tool, package in (("cmake", "cmake"), ("c++", "g++"), ("make", "make")):
        if shutil.which(tool) is None:
            _missing(f"{tool} is not installed; on Debian: apt install {package}")
    out = ROOT / "build" / source
    options = [f"-DPython3_EXECUTABLE={sys.executable}"]
    options += [f"-DCMAKE_C_FLAGS={FLAGS}", f"-DCMAKE_CXX_FLAGS={FLAGS}"]
    configured = _run("cmake", "-S", str(ROOT / source), "-B", str(out), *options)
    if configured.returncode != 0:
        _missing(
            f"{source} cannot be built here; its README or docs/embedding.md list what it needs:\n{_tail(configured)}"
        )
    built = _run("cmake", "--build", str(out), "--parallel", "2")
    assert built.returncode == 0, _tail(built)
    return out


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)


def _tail(run: subprocess.CompletedProcess[str]) -> str:
    return (run.stdout + run.stderr)[-4000:]


def _missing(what: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(what)
    pytest.skip(what)
