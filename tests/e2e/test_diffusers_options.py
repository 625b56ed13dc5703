"""Arguments of `parallelize`, and pipelines that it refuses or runs sequentially."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from drp.diffusers import Workers
from drp.diffusers.digits import DigitsPipeline, digits_pipeline
from drp.diffusers.structure import describe
from drp.sampling.mode_wrappers import PicardSweeps
from drp.sampling.modes import Aggressive
from tests.drafting import CHEAP, parallelize, reference
from tests.pipelines import run
from tests.tiny.builders import sdxl


@pytest.fixture
def workers(pipeline_workers: Workers) -> Workers:
    return pipeline_workers


def test_what_is_not_recognised_runs_sequentially_and_says_why(workers: Workers) -> None:
    pipe = sdxl()
    original = pipe.scheduler.scale_model_input

    def flipped(sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = original(sample, t)
        return scaled.flip(-1)

    pipe.scheduler.scale_model_input = flipped
    untouched = run(pipe, CHEAP)
    with parallelize(pipe, workers) as parallel:
        drafted = run(pipe, CHEAP)
    assert torch.equal(drafted, untouched)
    assert "scale_model_input was replaced" in parallel.report.calls[0].sequential
    assert parallel.report.calls[0].rounds == 7
    assert "without drafts" in str(parallel.report)


def test_what_cannot_be_handed_to_workers_is_refused() -> None:
    pipe = sdxl()
    pipe.unet.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="forward hooks"), parallelize(pipe, 2):
        pass
    pipe = sdxl()
    pipe.unet.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled by another backend than Inductor"), parallelize(pipe, 2):
        pass
    pipe = sdxl()
    pipe.unet.conv_in.forward = functools.partial(pipe.unet.conv_in.forward)
    with pytest.raises(ValueError, match=r"conv_in\.forward was replaced"), parallelize(pipe, 2):
        pass
    pipe = sdxl()
    pipe.unet._hf_hook = object()
    with pytest.raises(ValueError, match="accelerate"), parallelize(pipe, 2):
        pass
    pipe = sdxl()
    pipe.unet.to("meta")
    with pytest.raises(ValueError, match="meta"), parallelize(pipe, 2):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "rolling"}, "goes back"),
        ({"mode": PicardSweeps(Aggressive(2), 1)}, "goes back"),
        ({"devices": "2xemulated:1ms:values=cheap"}, "values other than the model's"),
        ({"mode": "agressive"}, "unknown mode"),
        ({"rule": "tangent"}, "unknown rule"),
        ({"devices": 0}, "a run needs 1"),
        ({"drafts": -1}, "at least 1 draft"),
        ({"drafts": "4"}, "drafts is '4'; a round needs at least 1 draft"),
        ({"mode": "adaptive", "tolerance": "low"}, "tolerance is 'low'; give a relative residual"),
        ({"execution": "sync"}, "execution is 'sync'; give a drp.ExecutionOptions"),
        ({"denoisers": ["transformer"]}, "lacks transformer"),
        ({"denoisers": "transformer"}, "lacks transformer"),
        ({"mode": "window", "target_rounds": 0}, "target_rounds is 0; give a whole number from 1"),
        ({"mode": "window", "target_speedup": 0.5}, "target_speedup is 0.5; give 1 or more"),
        ({"target_speedup": 2.0, "stride": 2.0}, "stride and target_speedup are given"),
        ({"target_rounds": 9, "mode": "aggressive"}, "target_rounds chooses a window, and mode is 'aggressive'"),
        ({"target_rounds": 9, "mode": Aggressive(2)}, "leave out target_rounds"),
    ],
)
def test_arguments_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), parallelize(sdxl(), **{"devices": 2, **options}):
        pass


@pytest.mark.parametrize(
    ("pipe", "given"),
    [("org/name", "str"), (Path("folder"), "PosixPath"), (DigitsPipeline, "the class DigitsPipeline")],
)
def test_what_is_not_a_loaded_pipeline_is_refused(pipe: object, given: str) -> None:
    with (
        pytest.raises(ValueError, match=f"{given} has no scheduler .*; give a loaded pipeline, as"),
        parallelize(pipe, 2),
    ):
        pass


def test_a_target_chooses_the_window_for_the_steps_of_each_call() -> None:
    pipe = digits_pipeline()
    window = {"mode": "window"}
    calls: list[dict[str, Any]] = [{"target_rounds": 6}, {"stride": 23 / 5, "drafts": 6}, {"target_speedup": 3.0}]
    images = []
    for options in calls:
        with reference(pipe, devices=8, **window, **options) as run:
            images.append(pipe([3], 24, generator=torch.Generator().manual_seed(1)).images)
        assert run.report.calls[-1].rounds == (8 if "target_speedup" in options else 6)
    assert torch.equal(images[0], images[1])
    with reference(pipe, devices=8, **window, target_rounds=3) as run:
        pipe([3], 24)
    why = run.report.calls[-1].sequential
    assert "target_rounds is 3; with at most 8 drafts, 24 steps take 4 rounds or more" in why


def test_a_count_is_of_the_kind_of_device_that_the_pipeline_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drp.leader.devices.has_gpus", lambda: True)
    pipe = digits_pipeline()
    with reference(pipe, devices=2):  # on cores: there is no GPU here that could be counted
        pass
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("mps"), raising=False)
    with pytest.raises(ValueError, match="there are no workers on mps devices"), reference(pipe, devices=2):
        pass


def test_a_pipeline_is_parallelised_once(workers: Workers) -> None:
    pipe = sdxl()
    with parallelize(pipe, workers), pytest.raises(ValueError, match="parallelised already"), reference(pipe):
        pass
    assert "forward" not in vars(pipe.unet)


def test_a_class_of_the_main_script_is_refused() -> None:
    class Local(torch.nn.Linear):
        """Not found by its name."""

    with pytest.raises(ValueError, match="cannot be imported by its name"):
        describe(Local(2, 2))
