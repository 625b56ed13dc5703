"""The command line, as a user runs it."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file

import drp as package
from drp.cli import main
from drp.cli.options import default_devices
from drp.cli.output import check_file, check_output, write_samples
from drp.cli.sample import parse_labels
from drp.leader.gpus import Gpu
from drp.trace import read as read_trace
from drp.trace import write as write_trace

ROOT = Path(__file__).parents[2]


def drp(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("drp")), *arguments]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


def test_sample_draws_a_picture(tmp_path: Path) -> None:
    arguments = ("-l", "7,1,3-4", "-r", "2", "-n", "6", "-d", "2", "-o", "out.png", "--trace", "run.json")
    done = drp("sample", "digits", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^window, 2 worker\(s\) on cpu:0, cpu:\d: 6 steps in 4 rounds, 6 evaluations, [\d.]+ s; "
        r"speed-up [\d.]+ of 1\.50 in theory\nwrote out\.png$",
        done.stdout.strip(),
    ), done.stdout
    assert "6/6" in done.stderr
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (4 * 60, 2 * 60)
        assert image.getextrema() != (0, 0)
    marks, devices, _ = read_trace(tmp_path / "run.json")
    assert [mark.kind for mark in marks].count("predicted") == 6
    assert len(devices) == 2


def here(*arguments: str) -> Result:
    """Do the same in this process, which has torch already; the tests above and below see that it is the same."""
    return CliRunner().invoke(main, arguments)


def test_a_model_of_ones_own(tmp_path: Path) -> None:
    out = str(tmp_path / "out.png")
    done = here("sample", "tests.denoisers:make_free", "--shape", "3,8,8", "-r", "2", "-n", "4", "-d", "1", "-o", out)
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "out.png") as image:
        assert (image.size, image.mode) == ((20, 40), "RGB")


def never(*_: object, **__: object) -> None:
    raise AssertionError("workers were started")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "agressive"], "'agressive' is not one of 'sequential'"),
        (["--steps", "0"], "0 is not in the range x>=1"),
        (["--labels", "11"], "label 11 is out of range; this model has the classes 0 to 9"),
        (["--labels", "3-1"], "write the smaller number first"),
        (["--labels", "three"], "'three' is not a label"),
        (["--devices", "0"], "devices is 0"),
        (["--devices", "tpu:0"], "device 'tpu:0' does not exist"),
        (["--rows", "0"], "0 is not in the range x>=1"),
        (["--shape", "1,x"], "shape is '1,x'"),
        (["--out", "nowhere/out.png"], "nowhere/out.png cannot be written"),
        (["--out", "."], "ends in .png, .npy or .safetensors"),
        (["--out", "out.jpg"], "ends in .png, .npy or .safetensors"),
        (["--trace", "nowhere/run.json"], "nowhere/run.json cannot be written"),
        (["digitz"], "unknown model 'digitz'; built in: digits"),
        (["no_such_module:make"], "there is no module 'no_such_module'"),
        (["--steps", "many"], "Invalid value"),
        (["--tolerance", "nan"], "'nan' is not a number"),
        (["--guidance", "nan"], "guidance is nan; give a number, -1e+06 to 1e+06"),
        (["--solver", "dim"], "'dim' is not one of 'ddim'"),
        (["--order", "2"], "solver_options holds 'order'"),
        (["--target-speedup", "100"], "target_speedup is 100"),
        (["--config", "nowhere.toml"], "nowhere.toml cannot be read"),
        (["--app-dir", "nowhere"], "folder nowhere does not exist"),
        (["tests.denoisers:make_free", "--mode", "agressive"], "'agressive' is not one of"),
        (["tests.denoisers:make_free", "--shape", "3,8,8", "--eta", "1", "--solver", "unipc"], "holds 'eta'"),
        (["tests.denoisers:make_free", "--shape", "4,8,8", "--out", "out.png"], "a picture has 1 or 3 channels"),
    ],
)
def test_bad_input_is_a_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("drp.leader.leader.Leader.__init__", never)  # refused before a worker starts
    done = here("sample", *arguments)
    assert done.exit_code in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_options_are_checked_before_a_model_of_ones_own_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drp.leader.leader.Leader.__init__", never)
    wrong: dict[str, Any] = {"mode": "agressive", "steps": 0, "solver": "dim", "rule": "best", "noise": torch.zeros(1)}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            package.sample("slow:make", shape=(4, 16, 16), **{name: value})


def test_bad_input_is_a_line_of_the_program(tmp_path: Path) -> None:
    done = drp("sample", "--labels", "11", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "label 11 is out of range" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_worker_that_fails_is_told_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = here("sample", "tests.denoisers:make_raising", "--shape", "1,8,8", "-n", "10", "-d", "1")
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


def here_json(*arguments: str) -> Any:
    """Return what a command prints as JSON on standard output, where nothing else may be."""
    done = here(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_samples_that_are_no_pictures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in the working directory, of four channels; each format holds what `sample` returns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("slow.py").write_text("from tests.denoisers import make_free as make\n")
    shown = here_json("sample", "slow:make", "--shape", "4,16,16", "-r", "2", "-n", "4", "-d", "1", "--drafts", "2")
    assert shown["out"] == "samples.safetensors"
    assert (shown["steps"], shown["rounds"], len(shown["devices"])) == (4, 3, 1)
    made = load_file("samples.safetensors")["samples"]
    assert made.shape == (2, 4, 16, 16)
    expected = package.reference("tests.denoisers:make_free", shape=(4, 16, 16), count=2, steps=4, devices=2)
    assert torch.equal(made, expected.samples)


def test_output_is_written_by_its_ending(tmp_path: Path) -> None:
    samples = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
    for name in ("a.png", "a.npy", "a.safetensors"):
        check_output(tmp_path / name, force=False)
        write_samples(samples, 2, tmp_path / name)
    assert np.array_equal(np.load(tmp_path / "a.npy"), samples.numpy())
    assert torch.equal(load_file(tmp_path / "a.safetensors")["samples"], samples)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (2 * (4 * 2 + 4), 4 * 2 + 4)


def test_a_file_that_drp_has_not_written_is_not_overwritten(tmp_path: Path) -> None:
    samples = torch.zeros(1, 1, 4, 4)
    for ending in (".png", ".safetensors"):
        path = tmp_path / f"out{ending}"
        write_samples(samples, 1, path)
        check_output(path, force=False)  # written by drp: it may be written again
    (tmp_path / "out.npy").write_bytes(b"anything")
    Image.new("L", (4, 4)).save(tmp_path / "photo.png")
    trace = tmp_path / "run.json"
    write_trace(trace, [], ["cpu:0"])
    check_file(trace, force=False)
    trace.write_text('{"name": "package"}')
    for path in (tmp_path / "out.npy", tmp_path / "photo.png"):
        with pytest.raises(ValueError, match=r"already exists.* give --force"):
            check_output(path, force=False)
        check_output(path, force=True)
    with pytest.raises(ValueError, match=r"already exists.* give --force"):
        check_file(trace, force=False)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the options with which `drp sample` would start; it then goes no further."""
    seen: dict[str, Any] = {}

    def keep(model: str, options: dict[str, Any]) -> None:
        seen.update(options, model=model)

    monkeypatch.setattr(importlib.import_module("drp.cli.sample"), "_sample", keep)  # the name is the command's
    return seen


def test_a_configuration_file_says_the_defaults(tmp_path: Path, given: dict[str, Any]) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        'model = "digits"\nsteps = 24\nlabels = [3, 1]\ndrafts-per-device = 2\njson = true\nmode = "adaptive"\n'
    )
    assert here("sample", "--config", str(config), "--steps", "12").exit_code == 0
    chosen = ("model", "steps", "labels", "drafts_per_device", "as_json", "mode", "seed")
    assert [given[name] for name in chosen] == ["digits", 12, "3,1", 2, True, "adaptive", 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step = 24", "has 'step', which is not an option of `main sample`; did you mean 'steps'?"),
        ('mode = "fast"', "'fast' is not one of"),
        ("steps = 0", "0 is not in the range"),
        ("steps", "cannot be read"),
        ("[steps]\nn = 1", "steps is a table"),
    ],
)
def test_a_configuration_file_is_checked(text: str, message: str, tmp_path: Path, given: dict[str, Any]) -> None:
    config = tmp_path / "run.toml"
    config.write_text(text)
    done = here("sample", "--config", str(config))
    assert done.exit_code == 2
    assert message in done.stderr
    assert not given


def test_models_are_found_in_the_working_directory_or_app_dir(
    tmp_path: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert here("sample").exit_code == 0
    assert sys.path[0] == str(Path.cwd())
    assert here("sample", "--app-dir", str(tmp_path)).exit_code == 0
    assert sys.path[0] == str(tmp_path)


@pytest.mark.parametrize(
    ("gpus", "expected"), [(0, ("2xcpu", 3, 1)), (1, ("cuda", 1, 4)), (2, ("2xcuda", 1, 1)), (8, ("4xcuda", 1, 1))]
)
def test_without_devices_what_there_is_is_used(
    gpus: int, expected: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find() -> tuple[Gpu, ...]:
        if not gpus:
            raise ValueError("there are none")
        return tuple(Gpu(index, f"GPU-{index}") for index in range(gpus))

    monkeypatch.setattr("drp.leader.gpus.find_gpus", find)
    monkeypatch.setattr("drp.cli.options.MAX_DEFAULT_WORKERS", 4 if gpus else 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert default_devices() == expected


@pytest.mark.parametrize(
    ("first_use", "platform", "words"),
    [
        ("import drp; drp.sample('digits')", "darwin", "this is macOS; run it in a Linux container"),
        ("import drp; drp.sample('digits')", "win32", "this is Windows; run it in WSL 2"),
        ("import drp.diffusers", "darwin", "this is macOS"),
        ("from drp.cli import main; main(['sample'])", "darwin", "this is macOS"),  # as Windows click looks for more
    ],
)
def test_other_systems_are_told_in_a_sentence(first_use: str, platform: str, words: str) -> None:
    """What other systems lack is taken away first, so that nothing is imported that needs it."""
    there = f"import os, sys; sys.platform = {platform!r}; del os.memfd_create, os.sched_getaffinity, os.eventfd; "
    done = subprocess.run(
        [sys.executable, "-c", there + first_use], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("RuntimeError: drp runs on Linux only", "Error: drp runs on Linux only"))
    assert words in last


def test_completion_offers_options() -> None:
    env = os.environ | {"_DRP_COMPLETE": "bash_complete", "COMP_WORDS": "drp sample --mo", "COMP_CWORD": "2"}
    done = subprocess.run(
        [Path(sys.executable).with_name("drp")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "plain,--mode" in done.stdout


def test_labels() -> None:
    assert parse_labels("3,1,4") == [3, 1, 4]
    assert parse_labels("0-2, 9") == [0, 1, 2, 9]
    assert parse_labels("") == []


def test_the_help_of_every_option_is_a_sentence() -> None:
    undocumented = {"mode", "solver"}  # of `drp sample` and `drp simulate`: their choices are listed

    def options(command: click.Command) -> Iterator[click.Option]:
        if isinstance(command, click.Group):
            for each in command.commands.values():
                yield from options(each)
        yield from (each for each in command.params if isinstance(each, click.Option))

    for option in options(main):
        text = option.help or ""
        assert text.endswith(".") or (not text and option.name in undocumented), option.name
        assert not re.search(r"\b[A-Z][a-z]+[A-Z][a-z]", text), f"{option.name}: {text}"  # the name of a class


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("no_such_module:make", "there is no module 'no_such_module'"),
        ("digit", "unknown model 'digit'; built in: digits"),
    ],
)
def test_a_server_refuses_a_model_before_workers_start(
    model: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drp.leader.Leader", lambda *_: pytest.fail("workers start"))
    done = CliRunner().invoke(main, ["serve", model, "--listen", f"ipc://{tmp_path}/server"])
    assert done.exit_code == 1
    assert done.output.startswith("Error: ")
    assert words in done.output
    assert "Traceback" not in done.output
