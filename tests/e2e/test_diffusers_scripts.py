"""`drp sample --diffusers`, and the example scripts, as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from drp.cli import main
from drp.cli.options import pipeline_devices
from drp.leader.gpus import Gpu
from drp.trace import read

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "examples" / "pipelines"


def python(*arguments: str, cwd: Path) -> str:
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{SCRIPTS}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a cat"], "--prompt needs a pipeline"),
        (["--diffusers", "."], "prompt is missing"),
        (["--diffusers", ".", "--prompt", "a cat", "--solver", "ddim"], "--solver applies to drp's own models"),
        (["--diffusers", ".", "--prompt", "a cat", "--labels", "3"], "--labels applies to"),
        (["--diffusers", ".", "--prompt", "a cat", "--out", "nowhere/out.png"], "cannot be written"),
    ],
)
def test_options_that_cannot_be_are_refused(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["sample", *arguments])
    assert done.exit_code == 1
    assert message in done.output


@pytest.mark.diffusers
def test_sample_draws_with_a_pipeline(tmp_path: Path) -> None:
    python("-c", "import tiny; tiny.sdxl().save_pretrained('sdxl')", cwd=tmp_path)
    said = python(
        *("-c", "from drp.cli import main; main()"),
        *("sample", "--diffusers", "sdxl", "--prompt", "a cat", "--negative-prompt", "a dog", "--guidance", "4"),
        *("--steps", "6", "--shape", "32,48", "--rows", "2", "--devices", "2", "--out", "out.png"),
        *("--trace", "run.json"),
        cwd=tmp_path,
    )
    assert "6 steps in 4 rounds, 6 evaluations" in said
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (48 + 4, 2 * (32 + 4))
    marks, devices, _ = read(tmp_path / "run.json")
    assert {mark.kind for mark in marks} >= {"begin", "sent", "predicted", "end"}
    assert len(devices) == 2


@pytest.mark.parametrize(
    ("given", "gpus", "expected"),
    [
        (None, 1, ("cuda", 4)),
        (None, 3, ("3xcuda", 1)),
        (None, 8, ("4xcuda", 1)),
        ("2xcpu", 3, ("2xcpu", 1)),
        ("6xcuda", 8, ("6xcuda", 1)),
    ],
)
def test_pipelines_use_the_gpus_unless_devices_are_named(
    given: str | None, gpus: int, expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drp.leader.gpus.find_gpus", lambda: tuple(Gpu(n, f"GPU-{n}") for n in range(gpus)))
    assert pipeline_devices(given) == expected


@pytest.mark.filterwarnings("ignore")  # of diffusers' own imports
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--diffusers", ".", "--prompt", "a cat"], "model_index.json"),
        (["http", "--diffusers", "a:b"], "'a:b'"),
    ],
)
def test_names_that_are_no_pipelines_are_refused(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert message in done.output
    assert done.exit_code == 1


@pytest.mark.diffusers
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "wan"])
def test_examples_run(name: str, tmp_path: Path) -> None:
    out = "out.gif" if name == "wan" else "out.png"
    said = python(str(SCRIPTS / f"{name}.py"), "--tiny", "--steps", "6", "--out", out, cwd=tmp_path)
    assert "6 steps in 4 rounds, 6 evaluations" in said
    with Image.open(tmp_path / out) as image:
        assert getattr(image, "n_frames", 1) == (5 if name == "wan" else 1)
