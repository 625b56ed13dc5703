"""The C++ client: the golden vectors, and both examples against a real server, with the bits of the Python call."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import drp
from drp.protocol import vectors
from tests.cpp_build import build
from tests.test_server import Served

HERE = Path(vectors.__file__).parent
MODEL = "tests.denoisers:Tiny"
DEADLINE = 60.0

pytestmark = pytest.mark.timeout(400)  # the first test builds


@pytest.fixture(scope="module")
def programs() -> Path:
    return build("tests/cpp")


@pytest.fixture(scope="module")
def served(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("serve"), "-d", "2", "--most", "16")
    try:
        yield served
        assert served.end() == (0, "")
    finally:
        served.process.kill()


def ran(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=DEADLINE)


def told(programs: Path, name: str) -> dict[str, tuple[str, str]]:
    """Return what the client makes of a file of vectors: by name, a word and what follows."""
    with (HERE / f"{name}.hex").open() as lines:
        run = subprocess.run(
            [programs / "check", "vectors"], stdin=lines, capture_output=True, text=True, timeout=DEADLINE, check=True
        )
    words = (line.split(" ", 2) for line in run.stdout.splitlines())
    return {name: (word, rest) for name, word, rest in words}


def test_golden_vectors(programs: Path) -> None:
    found, facts = told(programs, "door"), json.loads((HERE / "door.json").read_text())
    expected = dict(line.split(" ") for line in (HERE / "door.hex").read_text().splitlines())
    assert {name: word for name, (word, _) in found.items()} == expected
    for name, (_, text) in found.items():
        # As text, which tells 1 from 1.0.
        assert json.dumps(json.loads(text), sort_keys=True) == json.dumps(facts[name], sort_keys=True), name


def test_what_must_be_refused_is(programs: Path) -> None:
    found = {name: word for name, (word, _) in told(programs, "refused").items()}
    assert found == dict.fromkeys(json.loads((HERE / "refused.json").read_text()), "refused")


def test_the_example_in_cpp(programs: Path, served: Served, tmp_path: Path) -> None:
    samples = drp.reference(MODEL, labels=[3, 1, 4], devices=2).samples
    run = ran(programs / "examples/submit", served.address, "3,1,4", tmp_path / "out.f32")
    assert (run.returncode, run.stdout) == (0, f"aggressive: 48 steps in 25 rounds, {tmp_path}/out.f32\n")
    assert "step 48 of 48" in run.stderr
    assert (tmp_path / "out.f32").read_bytes() == samples.numpy().tobytes()

    assert ran(programs / "examples/submit", served.address, "3,1,4", tmp_path / "out.pgm").returncode == 0
    side_by_side = torch.cat(list(samples), dim=2)[0]
    shades = ((side_by_side + 1) * 127.5).clamp(0, 255) + 0.5
    assert (tmp_path / "out.pgm").read_bytes() == b"P5\n24 8\n255\n" + shades.numpy().astype(np.uint8).tobytes()


def test_the_example_in_c(programs: Path, served: Served, tmp_path: Path) -> None:
    run = ran(programs / "examples/submit_c", served.address, "7", tmp_path / "out.f32")
    assert (run.returncode, run.stdout) == (0, "48 steps in 25 rounds\n")
    samples = drp.reference(MODEL, labels=[7], devices=2).samples
    assert (tmp_path / "out.f32").read_bytes() == samples.numpy().tobytes()


@pytest.mark.parametrize("program", ["submit", "submit_c"])
def test_errors_are_told(programs: Path, served: Served, tmp_path: Path, program: str) -> None:
    for address, label, words in (
        (served.address, "11", "label 11 is out of range; this model has the classes 0 to 9"),
        ("nowhere", "1", "'nowhere' is no address; give ipc://PATH or tcp://HOST:PORT"),
    ):
        run = ran(programs / "examples" / program, address, label, tmp_path / "out.f32")
        assert run.returncode == 1
        assert words in run.stderr
