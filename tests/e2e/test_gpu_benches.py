"""The benches of pipelines for a GPU, with tiny networks on cores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("diffusers")

from bench import gpu, gpu_session, worker_cost
from bench.gpu_pipelines import Setting, as_graphs, call, denoiser, flux, main, sd15
from drp.models.gpu import Graphs
from tests import on_host


@pytest.mark.reports
def test_a_pipeline_has_the_bits_of_reference_alone_and_in_batches(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    main(["--tiny", "--compiled", "none", "--only", "flux", "--steps", "12", "-o", str(out)])
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


def test_a_session_ends_what_takes_too_long_and_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    endless = gpu_session.Part("endless", ("timeit", "-n", "1", "import time; time.sleep(60)"), 1)
    assert gpu_session.run(endless, 0.5, log).startswith("endless: ended at its limit")
    assert gpu_session.run(gpu_session.Part("broken", ("no_such_module",), 9), 9, log).startswith("broken: exit code 1")
    assert "No module named no_such_module" in log.read_text()


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_session_is_within_its_time_and_its_parts_exist(device: str, tmp_path: Path) -> None:
    parts = gpu_session.parts(device, tmp_path)
    assert sum(part.limit for part in parts) <= 11 * 60  # Each has some to spare; all together are ended after 8.
    root = Path(gpu_session.__file__).parents[1]
    for part in parts:
        module, *arguments = part.arguments
        assert module == "pytest" or (root / f"{module.replace('.', '/')}.py").exists()
        assert all((root / each).exists() for each in arguments if each.startswith("tests/"))
