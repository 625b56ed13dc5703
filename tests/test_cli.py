"""The command line, as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from drp.cli import main, parse_labels
from tests.conftest import leftovers, what_stays


def drp(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("drp")), *arguments]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


def test_sample_draws_a_picture(tmp_path: Path) -> None:
    done = drp("sample", "digits", "-l", "7,1,3-4", "-r", "2", "-n", "6", "-d", "2", "-o", "out.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^aggressive, 2 worker\(s\) on cpu:0, cpu:\d: 6 steps in 4 rounds, 6 evaluations, [\d.]+ s; "
        r"speed-up [\d.]+ of 1\.50 in theory\nwrote out\.png$",
        done.stdout.strip(),
    ), done.stdout
    assert "6/6" in done.stderr
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (4 * 60, 2 * 60)
        assert image.getextrema() != (0, 0)


def here(*arguments: str) -> Result:
    """Do the same in this process, which has torch already; the tests above and below see that it is the same."""
    return CliRunner().invoke(main, arguments)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    out = str(tmp_path / "out.png")
    done = here("sample", "tests.denoisers:make_free", "--shape", "3,8,8", "-r", "2", "-n", "4", "-o", out)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "out.png") as image:
        assert (image.size, image.mode) == ((20, 40), "RGB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "fast"], "unknown mode 'fast'"),
        (["--steps", "0"], "steps is 0"),
        (["--labels", "11"], "label 11 is out of range; this model has the classes 0 to 9"),
        (["--labels", "3-1"], "write the smaller number first"),
        (["--labels", "three"], "'three' is no label"),
        (["--devices", "0"], "devices is 0"),
        (["--devices", "tpu:0"], "device 'tpu:0' does not exist"),
        (["--rows", "0"], "rows is 0"),
        (["--shape", "1,x"], "shape is '1,x'"),
        (["--out", "nowhere/out.png"], "nowhere/out.png cannot be written"),
        (["--out", "."], "does not end in .png"),
        (["--out", "out.jpg"], "out.jpg does not end in .png"),
        (["digitz"], "unknown model 'digitz'; built in: digits"),
        (["--steps", "many"], "Invalid value"),
    ],
)
def test_bad_input_is_a_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = leftovers()
    monkeypatch.chdir(tmp_path)
    done = here("sample", *arguments)
    assert done.exit_code in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert not what_stays(before)


def test_bad_input_is_a_line_of_the_program(tmp_path: Path) -> None:
    done = drp("sample", "--mode", "fast", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "unknown mode 'fast'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_that_fails_is_told_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = here("sample", "tests.denoisers:make_raising", "--shape", "1,8,8", "-n", "10")
    assert done.exit_code == 1
    assert "the denoiser has had enough" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    done = drp("sample", cwd=tmp_path)
    assert "samples.png cannot be written: permission denied" in done.stderr


def test_help_and_version(tmp_path: Path) -> None:
    assert "sample" in drp("--help", cwd=tmp_path).stdout
    assert "--devices" in drp("sample", "-h", cwd=tmp_path).stdout
    assert drp("--version", cwd=tmp_path).stdout.startswith("drp, version ")


def test_labels() -> None:
    assert parse_labels("3,1,4") == [3, 1, 4]
    assert parse_labels("0-2, 9") == [0, 1, 2, 9]
    assert parse_labels("") == []
