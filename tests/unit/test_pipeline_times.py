"""Times of a pipeline's calls include what a GPU has queued. The clock advances where a GPU would be awaited."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from drp.diffusers import comparison, context
from drp.diffusers.comparison import PipelineSubject
from drp.diffusers.context import PipelineContext
from drp.diffusers.digits import digits_pipeline


class Clock:
    """A clock that advances by one second at each `wait`."""

    def __init__(self) -> None:
        self.now = 0.0

    def wait(self, *_: Any) -> None:
        self.now += 1.0

    def perf_counter(self) -> float:
        return self.now


def test_a_sample_of_a_comparison_is_timed_until_its_latents_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, cpu = Clock(), torch.Tensor.cpu

    def read(tensor: torch.Tensor) -> torch.Tensor:
        clock.wait()
        return cpu(tensor)

    subject = PipelineSubject(digits_pipeline(), {"labels": [3], "num_inference_steps": 4})
    monkeypatch.setattr(PipelineSubject, "_pictures", lambda *_: None)  # as for output_type="latent"
    monkeypatch.setattr(comparison, "time", clock)
    monkeypatch.setattr(torch.Tensor, "cpu", read)
    assert subject.sample(0).seconds == clock.now > 0


def test_the_time_of_an_evaluation_is_that_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(context, "time", clock)
    monkeypatch.setattr(context, "synchronize", clock.wait)
    shared: Any = SimpleNamespace(modules={"unet": lambda x, factor: x * factor})
    for gpus, seconds in (([torch.device("cuda", 0)], 1.0), ([], 0.0)):
        assert PipelineContext.evaluate(shared, "unet", (2,), {"factor": 3}, gpus) == (6, seconds)
