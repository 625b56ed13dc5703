"""The benches of pipelines for a GPU, with tiny networks on cores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from bench.gpu_pipelines import Setting, as_graphs, call, denoiser, flux, main, sd15
from drp.models.gpu import Graphs
from tests import on_host

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]


@pytest.mark.reports
def test_a_pipeline_has_the_bits_of_reference_alone_and_in_batches(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tiny", "--compiled", "none", "--only", "flux", "--steps", "12"])
    rows = {line[2:48].strip(): line[48:] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
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
