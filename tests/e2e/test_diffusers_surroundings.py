"""What a denoiser's results depend on besides its arguments: its own state, its classes and modules, random numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from drp.diffusers import Workers, parallelize, reference
from tests import stateful_denoisers
from tests.e2e.test_diffusers_calls import CHEAP, euler, exact
from tests.pipelines import PIPELINES, drafted, run
from tests.stateful_denoisers import (
    Around,
    AveragingLater,
    Caching,
    CachingBySize,
    CountingInArray,
    CountingInBuffer,
    CountingInClass,
    CountingInModule,
    CountingInNumber,
    CountingInTensor,
    CountingLater,
    DrawingFromNumpy,
    DrawingFromPython,
    DrawingItself,
    OfClass,
    OfCore,
    OfEnvironment,
    OfModule,
    Recording,
    RecordingInBuffer,
    WithNumber,
    WritingToList,
    WritingToTensor,
)
from tests.tiny.builders import ddim, flux, normal, unet


def around(kind: type[Around]) -> Any:
    pipe = euler()
    pipe.unet.conv_in = kind(pipe.unet.conv_in)
    return pipe


def guided(kind: type[Around]) -> Any:
    """A pipeline that calls its denoiser once for each branch of guidance."""
    pipe = flux()
    pipe.transformer.x_embedder = kind(pipe.transformer.x_embedder)
    return pipe


GUIDED = PIPELINES["Flux, true CFG"][1]


@pytest.fixture(scope="module")
def stacking_workers() -> Iterator[Workers]:
    with Workers(2, threads=1, drafts_per_device=2) as made:
        yield made


@pytest.fixture(params=["", "split guidance", "batches"])
def way(request: pytest.FixtureRequest) -> tuple[Workers, dict[str, Any]]:
    """Workers, and options by which they evaluate a program as a whole, in parts, or for several drafts at once."""
    name = "stacking_workers" if request.param == "batches" else "pipeline_workers"
    return request.getfixturevalue(name), {"split_guidance": True} if request.param == "split guidance" else {}


def scaled(tensor: Tensor) -> None:
    tensor.mul_(0.5)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a buffer": lambda unet: scaled(unet.conv_in.scale),
    "a tensor that is an attribute": lambda unet: scaled(unet.conv_in.factor),
    "an array that is an attribute": lambda unet: np.copyto(unet.conv_in.array, 0.5),
    "a weight in place": lambda unet: scaled(unet.conv_in.inner.weight.data),
    "a weight's data": lambda unet: setattr(unet.conv_in.inner.weight, "data", unet.conv_in.inner.weight.data * 0.5),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_callback_may_change(what: str, pipeline_workers: Workers) -> None:
    def change(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if i == 3:
            CHANGES[what](pipe.unet)
        return kept

    options = {**CHEAP, "callback_on_step_end": change}
    untouched = run(around(Around), options)
    pipe = around(Around)
    with reference(pipe):
        assert torch.equal(run(pipe, options), untouched)
    pipe = around(Around)
    with parallelize(pipe, pipeline_workers, drafts=1) as parallel:
        assert torch.equal(run(pipe, options), untouched)
    assert not parallel.report.calls[0].sequential


@pytest.mark.parametrize("kind", [OfClass, OfModule])
def test_numbers_in_a_class_or_module_of_the_program_may_change(kind: type[Around], pipeline_workers: Workers) -> None:
    """Before workers import the class, and by a callback in the middle of a call."""

    def set_strength(value: float) -> None:
        OfClass.strength = stateful_denoisers.strength = value

    def change(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        set_strength(0.5 if i > 2 else 0.9)
        return kept

    def call(pipe: Any) -> Tensor:
        set_strength(0.9)
        return run(pipe, {**CHEAP, "callback_on_step_end": change})

    untouched = call(around(kind))
    pipe = around(kind)
    with parallelize(pipe, pipeline_workers, drafts=1) as parallel:
        assert torch.equal(call(pipe), untouched)
    assert not parallel.report.calls[0].sequential


@pytest.mark.parametrize(
    "kind",
    [
        CountingInBuffer,
        CountingInTensor,
        CountingInNumber,
        CountingInArray,
        CountingInClass,
        CountingInModule,
        DrawingItself,
        Recording,
        RecordingInBuffer,
    ],
)
def test_a_denoiser_that_each_evaluation_changes_is_not_drafted(kind: type[Around]) -> None:
    """Not even if the change has no effect on later evaluations: the program may read it."""

    def call(pipe: Any) -> tuple[Tensor, list[float]]:
        CountingInClass.count = stateful_denoisers.evaluations = 0
        seen: list[float] = []

        def read(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
            seen.append(float(getattr(pipe.unet.conv_in, "seen", 0)))
            return kept

        return run(pipe, {**CHEAP, "callback_on_step_end": read}), seen

    untouched = call(around(kind))
    pipe = around(kind)
    with reference(pipe, devices=2) as parallel:
        drafted = call(pipe)
    assert torch.equal(drafted[0], untouched[0])
    assert drafted[1] == untouched[1]
    assert "unet itself is changed by each evaluation" in parallel.report.calls[0].sequential


def test_a_denoiser_that_returns_a_number_which_changes_is_not_drafted() -> None:
    @torch.no_grad()
    def call(pipe: Any) -> Tensor:
        pipe.unet.__class__ = WithNumber
        pipe.scheduler.set_timesteps(6)
        x, e = normal(1, 4, 8, 8), normal(1, 6, 8, seed=2)
        for t in pipe.scheduler.timesteps:
            v, mean = pipe.unet(pipe.scheduler.scale_model_input(x, t), t, encoder_hidden_states=e)
            x = pipe.scheduler.step(v - mean, t, x).prev_sample
        return torch.as_tensor(x)

    assert "differ from one evaluation to the next must be tensors" in exact(euler(), call).report.calls[0].sequential


@pytest.mark.parametrize(
    ("kind", "why"), [(WritingToTensor, "unet writes to store[0]"), (WritingToList, "unet adds to its arguments")]
)
def test_a_denoiser_that_writes_to_its_arguments_is_not_drafted(kind: type, why: str) -> None:
    @torch.no_grad()
    def call(pipe: Any) -> Tensor:
        pipe.unet.__class__ = kind
        pipe.scheduler = ddim()
        pipe.scheduler.set_timesteps(6)
        x, e = normal(1, 4, 8, 8), normal(1, 6, 8, seed=2)
        for t in pipe.scheduler.timesteps:
            store = [torch.zeros(())]
            v = pipe.unet(x, t, encoder_hidden_states=e, store=store).sample
            x = pipe.scheduler.step(v * (1 + sum(store)), t, x).prev_sample
        return torch.as_tensor(x)

    assert why in exact(euler(), call).report.calls[0].sequential


def test_what_workers_cannot_reproduce_is_not_drafted(
    way: tuple[Workers, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment may change between calls, too."""
    workers, options = way
    monkeypatch.setenv("STRENGTH", "0.9")
    untouched = run(guided(OfEnvironment), GUIDED)
    pipe = guided(OfEnvironment)
    with parallelize(pipe, workers, **options) as parallel:
        assert torch.equal(run(pipe, GUIDED), untouched)
        monkeypatch.setenv("STRENGTH", "1")
        run(pipe, GUIDED)
        monkeypatch.setenv("STRENGTH", "0.9")
        assert torch.equal(run(pipe, GUIDED), untouched)
    first, second, third = parallel.report.calls
    assert first.sequential.startswith("workers have other results than this process")
    assert not second.sequential
    assert third.sequential == first.sequential


def test_what_one_worker_cannot_reproduce_is_not_drafted(way: tuple[Workers, dict[str, Any]]) -> None:
    workers, options = way
    untouched = run(guided(OfCore), GUIDED)
    pipe = guided(OfCore)
    with parallelize(pipe, workers, drafts=1, **options) as parallel:
        assert torch.equal(run(pipe, GUIDED), untouched)
    assert parallel.report.calls[0].sequential.startswith("workers have other results than this process")


@pytest.mark.parametrize("kind", [CountingLater, AveragingLater])
def test_a_denoiser_that_begins_to_change_itself_is_not_drafted_from_then_on(
    kind: type[Around], pipeline_workers: Workers
) -> None:
    def call(pipe: Any) -> tuple[Tensor, int, float]:
        made = run(pipe, CHEAP, 10)
        return made, pipe.unet.time_proj.calls, float(pipe.unet.time_proj.scale)

    def late() -> Any:
        pipe = euler()
        pipe.unet.time_proj = kind(pipe.unet.time_proj)
        return pipe

    pipe = late()
    untouched = [call(pipe), call(pipe)]
    pipe = late()
    with parallelize(pipe, pipeline_workers, drafts=1) as parallel:
        for sample, *state in untouched:
            made, *made_state = call(pipe)
            assert torch.equal(made, sample)
            assert made_state == state
    for report in parallel.report.calls:
        assert "unet itself was changed by an evaluation" in report.sequential
        assert report.evaluations > 5


def test_a_cache_that_is_filled_once_is_no_hindrance() -> None:
    untouched = run(around(Caching), CHEAP)
    pipe = around(Caching)
    with reference(pipe) as parallel:
        assert torch.equal(run(pipe, CHEAP), untouched)
    assert not parallel.report.calls[0].sequential
    with reference(around(Caching), devices=2, mode="aggressive") as parallel:
        run(parallel._pipe, CHEAP, 11)
    assert parallel.report.calls[0].rounds == 6


def test_a_cache_that_batches_fill_in_workers_is_no_hindrance(stacking_workers: Workers) -> None:
    pipe = around(CachingBySize)
    with parallelize(pipe, stacking_workers, "aggressive") as parallel:
        first = run(pipe, CHEAP, 7)
        run(pipe, CHEAP, 8)  # Its last round has another number of drafts.
        assert torch.equal(run(pipe, CHEAP, 7), first)
    for report in parallel.report.calls:
        drafted(report)


def test_weights_that_were_cast_between_two_calls_stay_so() -> None:
    pipe = euler()

    def call(pipe: Any) -> Tensor:
        first = run(pipe, CHEAP)
        pipe.unet.to(torch.bfloat16)
        second = run(pipe, {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in CHEAP.items()})
        pipe.unet.to(torch.float32)
        return torch.cat([first, second.float()])

    call(pipe)  # Weights are rounded once.
    exact(pipe, call)
    assert pipe.unet.dtype == torch.float32


def test_random_numbers_of_a_denoiser_are_not_drafted() -> None:
    pipe = euler()
    pipe.unet = unet(dropout=0.2).train()

    def call(pipe: Any) -> Tensor:
        torch.manual_seed(1)
        return run(pipe, CHEAP)

    assert "unet draws random numbers" in exact(pipe, call).report.calls[0].sequential


@pytest.mark.parametrize("kind", [DrawingFromNumpy, DrawingFromPython])
def test_random_numbers_of_other_generators_are_not_drafted(kind: type[Around]) -> None:
    def call(pipe: Any) -> Tensor:
        np.random.seed(1)
        random.seed(1)
        return run(pipe, CHEAP)

    assert "unet draws random numbers" in exact(around(kind), call).report.calls[0].sequential
