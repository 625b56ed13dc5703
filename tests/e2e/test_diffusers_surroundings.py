"""What a denoiser's results depend on besides its arguments: its own state, torch's, and what is put around it."""

from __future__ import annotations

import copy
import io
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode

from drp.diffusers import Workers, parallelize, reference
from drp.sampling.drafts import STEADY
from drp.torch_defaults import SETTINGS
from tests.e2e.test_diffusers_calls import CHEAP, euler, exact
from tests.pipelines import PIPELINES, run
from tests.tiny.builders import ddim, flux, normal, unet

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]


strength, evaluations = 1.0, 0


class Around(nn.Module):
    """A layer of a pipeline's own, times a factor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls, self.factor = inner, 0, torch.ones(1)
        self.array = np.ones(1)
        self.register_buffer("scale", torch.ones(1))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * self.factor * self.scale * float(self.array[0])
        return out


class CountingInBuffer(Around):
    def forward(self, x: Tensor) -> Tensor:
        self.scale *= 1.1
        return super().forward(x)


class CountingInTensor(Around):
    def forward(self, x: Tensor) -> Tensor:
        self.factor *= 1.1
        return super().forward(x)


class CountingInNumber(Around):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * 1.1**self.calls


class CountingInArray(Around):
    """Counts in what has no attributes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.counts = np.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.counts += 1
        return super().forward(x) * 1.1 ** int(self.counts[0])


class DrawingItself(Around):
    """Draws from a generator of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.rand(1, generator=self.generator)


class DrawingFromNumpy(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * float(np.random.rand())


class DrawingFromPython(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * random.random()


class OfClass(Around):
    strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.strength


class CountingInClass(Around):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        CountingInClass.count += 1
        return super().forward(x) * 1.1**CountingInClass.count


class CountingInModule(Around):
    def forward(self, x: Tensor) -> Tensor:
        global evaluations
        evaluations += 1
        return super().forward(x) * 1.1**evaluations


class OfModule(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * strength


class OfEnvironment(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(os.environ.get("STRENGTH", "1"))


class OfCore(Around):
    """Has other results in the workers that do not run on this process's first core."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.core = min(os.sched_getaffinity(0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if self.core in os.sched_getaffinity(0) else 0.9)


class Recording(Around):
    """Keeps a number of its last evaluation for its user."""

    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.seen = out.mean()
        return out


class RecordingInBuffer(Around):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.seen.copy_(out.mean())
        return out


class WithNumber(UNet2DConditionModel):  # type: ignore[misc]  # diffusers has no types
    """Returns a number beside its prediction."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        out = super().forward(*args, **kwargs).sample
        return out, float(out.mean())


class WritingToTensor(UNet2DConditionModel):  # type: ignore[misc]  # likewise
    def forward(self, *args: Any, store: list[Tensor], **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        store[0].copy_(out.sample.mean())
        return out


class WritingToList(UNet2DConditionModel):  # type: ignore[misc]  # likewise
    def forward(self, *args: Any, store: list[Tensor], **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        store.append(out.sample.mean())
        return out


class Caching(Around):
    """Fills a cache when it is first evaluated."""

    def forward(self, x: Tensor) -> Tensor:
        if self.calls == 0:
            self.calls, self.factor = 1, torch.full((1,), 1.1)
        return super().forward(x)


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
        global strength
        OfClass.strength = strength = value

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
        global evaluations
        CountingInClass.count = evaluations = 0
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


def test_a_function_of_torch_that_was_replaced_is_not_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users of other attention kernels do."""
    attend = nn.functional.scaled_dot_product_attention

    def weaker(*args: Any, **kwargs: Any) -> Tensor:
        return attend(*args, **kwargs) * 0.9

    def replace(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend if i < 3 else weaker)
        return kept

    def call(pipe: Any) -> Tensor:
        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
        return run(pipe, {**CHEAP, "callback_on_step_end": replace})

    parallel = exact(euler(), call)
    assert "scaled_dot_product_attention was replaced" in parallel.report.calls[0].sequential


def test_a_cache_that_is_filled_once_is_no_hindrance() -> None:
    untouched = run(around(Caching), CHEAP)
    pipe = around(Caching)
    with reference(pipe) as parallel:
        assert torch.equal(run(pipe, CHEAP), untouched)
    assert not parallel.report.calls[0].sequential
    with reference(around(Caching), devices=2, mode="aggressive") as parallel:
        run(parallel._pipe, CHEAP, 11)
    assert parallel.report.calls[0].rounds == 6


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


def test_gradients_through_a_denoiser_are_not_drafted() -> None:
    """As guidance by a classifier or by a measurement takes them."""

    def call(pipe: Any) -> Tensor:
        pipe.unet.requires_grad_(False)
        pipe.scheduler.set_timesteps(6)
        x, e = normal(1, 4, 8, 8), normal(1, 6, 8, seed=2)
        for t in pipe.scheduler.timesteps:
            x = x.detach().requires_grad_(True)
            v = pipe.unet(pipe.scheduler.scale_model_input(x, t), t, encoder_hidden_states=e).sample
            (gradient,) = torch.autograd.grad(v.square().mean(), x)
            x = pipe.scheduler.step(v.detach() + gradient, t, x.detach()).prev_sample
        return torch.as_tensor(x)

    assert "gradients are recorded through unet" in exact(euler(), call).report.calls[0].sequential


class Quieter(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made * 0.9 if func is nn.functional.silu else made


@contextmanager
def hook_of_all_modules() -> Iterator[None]:
    handle = register_module_forward_hook(lambda module, args, made: made * 0.9 if type(module) is nn.Conv2d else None)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(("block", "why"), [(Quieter, "under Quieter"), (hook_of_all_modules, "hook of all modules")])
def test_what_changes_torch_in_this_process_is_not_drafted(
    block: Callable[[], AbstractContextManager[Any]], why: str
) -> None:
    def call(pipe: Any) -> Tensor:
        with block():
            return run(pipe, CHEAP)

    assert why in exact(euler(), call).report.calls[0].sequential


@contextmanager
def precision(owner: Any, value: str) -> Iterator[None]:
    before = owner.fp32_precision
    owner.fp32_precision = value
    try:
        yield
    finally:
        owner.fp32_precision = before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="since torch 2.9")
@pytest.mark.parametrize("name", ["all", "cuda.matmul", "mkldnn.matmul", "cudnn.conv"])
def test_precisions_by_torch_s_newer_attributes_are_carried_over(name: str, pipeline_workers: Workers) -> None:
    backends = torch.backends
    owner = {
        "all": backends,
        "cuda.matmul": backends.cuda.matmul,
        "mkldnn.matmul": backends.mkldnn.matmul,  # type: ignore[attr-defined]  # torch has no types for it
        "cudnn.conv": backends.cudnn.conv,  # type: ignore[attr-defined]  # likewise
    }[name]
    pipe = euler()
    with precision(owner, "ieee" if name == "cudnn.conv" else "tf32"):
        before = [read() for read, _, _ in SETTINGS]
        untouched = run(pipe, CHEAP)
        with parallelize(pipe, pipeline_workers, drafts=1) as parallel:
            assert torch.equal(run(pipe, CHEAP), untouched)
        assert [read() for read, _, _ in SETTINGS] == before
    assert not parallel.report.calls[0].sequential


def test_a_denoiser_may_be_copied_and_pickled_meanwhile() -> None:
    def call(pipe: Any) -> Tensor:
        made = [run(copy.deepcopy(pipe), CHEAP)]
        made.append(run(pipe, CHEAP))
        pipe.unet = copy.deepcopy(pipe.unet)
        made.append(run(pipe, CHEAP))
        file = io.BytesIO()
        torch.save(pipe.unet, file)
        file.seek(0)
        pipe.unet = torch.load(file, weights_only=False)
        return torch.cat([*made, run(pipe, CHEAP)])

    parallel = exact(euler(), call)
    assert len(parallel.report.calls) == 3  # The copied pipeline is no longer drp's.
    assert not any(each.sequential for each in parallel.report.calls)


@pytest.mark.parametrize("how", ["compile", "torch.compile"])
def test_a_denoiser_may_be_compiled_meanwhile(how: str) -> None:
    def call(pipe: Any) -> Tensor:
        first = run(pipe, CHEAP, 3)
        if how == "compile":
            pipe.unet.compile(backend="eager")
        else:
            pipe.unet = torch.compile(pipe.unet, backend="eager")
        return torch.cat([first, run(pipe, CHEAP, 3)])

    pipe = euler()
    untouched = call(euler())
    with reference(pipe) as parallel:
        assert torch.equal(call(pipe), untouched)
        assert type(pipe.unet) is UNet2DConditionModel
    assert "compiled by another backend than Inductor" in parallel.report.calls[1].sequential
    assert (type(pipe.unet) is UNet2DConditionModel) == (how == "compile")
    assert torch.equal(run(pipe, CHEAP, 3), untouched[1:])


def test_two_pipelines_may_share_a_scheduler() -> None:
    first, second = euler(), euler()
    second.unet, second.scheduler = unet(layers_per_block=2), first.scheduler
    untouched = run(first, CHEAP, 11), run(second, CHEAP, 10)
    with reference(first, devices=2) as one, reference(second, devices=2) as other:
        for _ in range(2):
            run(first, CHEAP, 11), run(second, CHEAP, 10)
    for parallel, steps in ((one, 11), (other, 10)):
        assert [(each.steps, each.sequential) for each in parallel.report.calls] == [(steps, "")] * 2
    with reference(first) as one, reference(second) as other:
        assert torch.equal(run(first, CHEAP, 11), untouched[0])
        assert torch.equal(run(second, CHEAP, 10), untouched[1])


def test_the_defaults_are_those_of_the_scheduler_that_a_call_has() -> None:
    images = []
    choices: tuple[dict[str, Any], ...] = ({}, {"stride": 2.5, "rule": STEADY})
    for options in choices:
        pipe = euler()
        with reference(pipe, devices=4, **options):
            pipe.scheduler = DPMSolverMultistepScheduler.from_config(
                pipe.scheduler.config, algorithm_type="sde-dpmsolver++"
            )
            images.append(run(pipe, CHEAP, 12))
    assert torch.equal(*images)
