"""Settings and hooks of torch in the program, and what else it may do with a pipeline inside `parallelize`."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

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
from tests.pipelines import run
from tests.tiny.builders import normal, unet


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
