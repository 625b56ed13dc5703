"""The benches of pipelines for a GPU, with tiny networks on cores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("diffusers")

from bench import gpu, gpu_facts, gpu_pipelines, gpu_session, worker_cost
from bench.gpu_pipelines import Setting, as_graphs, call, denoiser, flux, main, problems, sd15
from drp.models.gpu import Graphs
from tests import on_host


@pytest.mark.reports
def test_a_pipeline_has_the_bits_of_reference_alone_and_in_batches(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    assert main(["--tiny", "--compiled", "none", "--only", "flux", "--steps", "12", "-o", str(out)]) == 0
    rows = json.loads(out.read_text())["flux"]
    assert rows["the bits of reference"] == rows["four drafts as a batch, the bits"] == "True"
    assert rows["one draft, the untouched bits"] == "True"
    assert rows["rounds"] == "7 of 12 steps"
    assert rows["four drafts as a batch: batched"] == "yes"


def test_the_untouched_pipeline_as_a_graph_has_its_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DRP_TEST_STEPS", str(tmp_path / "steps"))
    monkeypatch.setattr(Graphs, "_capture", on_host.capture)
    setting = Setting("cpu", torch.float32, True, "2xcpu", 4, True, False)
    for make in (sd15, flux):
        pipe, options = make(setting)
        pipe.set_progress_bar_config(disable=True)
        untouched = call(pipe, options, setting)
        with as_graphs(denoiser(pipe)):
            assert torch.equal(call(pipe, options, setting), untouched)
        assert "forward" not in vars(denoiser(pipe))
    assert len(on_host.steps(tmp_path)) == 2


@pytest.mark.reports
def test_the_benches_of_workers_run_on_a_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their whole control flow, so that it does not meet a GPU untried."""
    monkeypatch.setattr(gpu, "STEPS", 9)
    monkeypatch.setattr(worker_cost, "STEPS", 9)
    arguments = {
        gpu.main: ["--device", "cpu", "--models", "dit", "--turns", "1"],
        worker_cost.main: ["--device", "cpu", "--model", "dit", "--turns", "1"],
    }
    found = []
    for place, (command, options) in enumerate(arguments.items()):
        out = tmp_path / f"{place}.json"
        done = CliRunner().invoke(command, [*options, "-o", str(out)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        found.append(json.loads(out.read_text()))
    assert set(found[0]["small_dit"]["eager"]["runs"]) == {"1", "2", "4", "8"}
    assert len(found[1]["seconds"]) == 5


def test_a_row_that_says_that_something_is_wrong_is_a_problem() -> None:
    good = {"the bits of reference": "True", "sequential because": "it was not", "a batch: batched": "yes", "x, s": "1"}
    assert not problems(good)
    bad = {"the bits of reference": "False", "sequential because": "it is", "graphs: FAILED": "RuntimeError: no"}
    assert problems({**good, **bad}) == [f"{name}: {value}" for name, value in bad.items()]


@pytest.mark.parametrize(
    ("devices", "first"),
    [("4xcuda", "cuda:0"), ("2xcuda:1", "cuda:1"), ("cuda:2,cuda:0", "cuda:2"), ("2xcpu", "cpu:0")],
)
def test_the_pipeline_is_on_the_first_device(devices: str, first: str) -> None:
    assert gpu_pipelines._first(devices) == first


def test_what_fails_of_a_pipeline_does_not_keep_the_rest_from_being_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> gpu_pipelines.Rows:
        yield "untouched, s", "1"
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_pipelines, "measure_workers", fail)
    monkeypatch.setattr(gpu_pipelines, "measure_batch", lambda *_: iter([("a batch", "2")]))
    rows = dict(gpu_pipelines.measure(sd15, Setting("cpu", torch.float32, True, "2xcpu", 4, False, False)))
    assert rows["several workers: FAILED"] == "RuntimeError: out of memory"
    assert (rows["untouched, s"], rows["a batch"]) == ("1", "2")


HANGING = "import time\ndef hang_here(): time.sleep(60)\nprint('began', flush=True)\nhang_here()\n"


def test_a_session_ends_what_takes_too_long_says_where_it_was_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    parts = [
        gpu_session.Part("good", ("this",), 60),
        gpu_session.Part("endless", ("hanging",), 2),
        gpu_session.Part("broken", ("no_such_module",), 60),
        gpu_session.Part("late", ("this",), 60),
    ]
    monkeypatch.setattr(gpu_session, "parts", lambda device, out: parts)
    done = CliRunner().invoke(gpu_session.main, ["--parts", "good,endless,broken", "-o", str(tmp_path)])
    assert done.exit_code == 1
    said = done.output[done.output.index("FAILED") :]
    assert said.startswith("FAILED: endless: ended at its limit after")
    assert "in hang_here" in said  # where it was
    assert said.index("No module named no_such_module") < said.index("passed: good")
    ended = json.loads((tmp_path / "session.json").read_text())
    assert [(each["name"], each["failed"]) for each in ended] == [("good", False), ("endless", True), ("broken", True)]
    assert "The Zen of Python" in (tmp_path / "session.log").read_text()
    late = CliRunner().invoke(gpu_session.main, ["--parts", "late", "--minutes", "0", "-o", str(tmp_path)])
    assert "not begun, the time was up: late; run it with --parts late" in late.output
    unknown = CliRunner().invoke(gpu_session.main, ["--parts", "other"])
    assert "other: the parts are good, endless, broken, late" in unknown.output


def test_a_session_says_first_what_its_machine_lacks(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setitem(gpu_facts.PACKAGES, "no_such_module", "no-such-package")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_facts.main() == 1
    seen = capfd.readouterr().out
    assert "PROBLEM: the package no-such-package is missing" in seen
    assert "CUDA_VISIBLE_DEVICES=" in seen


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_parts_of_a_session_exist_and_the_first_fit_its_time(device: str, tmp_path: Path) -> None:
    parts = gpu_session.parts(device, tmp_path)
    assert sum(part.limit for part in parts[:5]) <= 9 * 60  # Each has some to spare; all together are ended after 8.
    root = Path(gpu_session.__file__).parents[1]
    for part in parts:
        module, *arguments = part.arguments
        assert module == "pytest" or (root / f"{module.replace('.', '/')}.py").exists()
        assert all((root / each).exists() for each in arguments if each.startswith("tests/"))
