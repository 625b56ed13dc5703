"""Programs that change latents, steps, weights, adapters or torch's settings, between calls and during one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

from drp.diffusers import Workers
from drp.diffusers.report import CallReport
from tests.drafting import CHEAP, parallelize, reference
from tests.pipelines import PICTURE, PIPELINES, TEXT, controlled, run, wan22
from tests.rounds import rounds_of
from tests.tiny.builders import normal, sd3, sdxl


@pytest.fixture
def workers(pipeline_workers: Workers) -> Workers:
    return pipeline_workers


def test_interrupt_ends_the_call(workers: Workers) -> None:
    pipe = sdxl()

    def stop(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i >= 2
        return {}

    with parallelize(pipe, workers, drafts=1) as parallel:
        drafted = run(pipe, {**CHEAP, "callback_on_step_end": stop})
    assert torch.equal(run(pipe, {**CHEAP, "callback_on_step_end": stop}), drafted)
    assert parallel.report.calls[0].steps == 3


def run_three_ways(
    pipe: Any, options: dict[str, Any], workers: Workers
) -> tuple[torch.Tensor, torch.Tensor, CallReport]:
    """Return the untouched and the drafted samples; workers have the former's bits with one draft, else reference's."""
    untouched = run(pipe, options)
    with parallelize(pipe, workers, drafts=1):
        assert torch.equal(run(pipe, options), untouched)
    with reference(pipe, devices=3):
        expected = run(pipe, options)
    with parallelize(pipe, workers) as parallel:
        assert torch.equal(run(pipe, options), expected)
    (report,) = parallel.report.calls
    return untouched, expected, report


def test_a_callback_may_nudge_the_latents(workers: Workers) -> None:
    pipe = sdxl()

    def nudge(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        return {"latents": kept["latents"] * 1.01}

    untouched, drafted, report = run_three_ways(pipe, {**CHEAP, "callback_on_step_end": nudge}, workers)
    assert report.rounds == rounds_of("aggressive", 7, 3)
    assert float((drafted - untouched).norm() / untouched.norm()) < 0.1


def test_latents_that_a_callback_replaces_end_the_drafts(workers: Workers) -> None:
    pipe = sdxl()

    def replace_latents(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        return {"latents": normal(1, 4, 8, 8, seed=9)} if i == 4 else {}

    options = {**CHEAP, "callback_on_step_end": replace_latents}
    with reference(pipe, devices=3):
        expected = run(pipe, options, steps=10)
    with parallelize(pipe, workers) as parallel:
        assert torch.equal(run(pipe, options, steps=10), expected)
    (report,) = parallel.report.calls
    assert "drafts were given up: the latents were replaced between two steps" in report.notes
    assert report.rounds == 1 + 2 + 1 + 2  # steps 0, 1-3 and 4-6, of which 5 and 6 are dropped; then 5, 6-8 and 9


@pytest.mark.parametrize(
    ("make", "options", "lessons"),
    [
        (wan22, PIPELINES["Wan"][1], 1),
        (controlled, {**TEXT, **PICTURE, "control_guidance_end": 0.5}, 1),
        (controlled, {**TEXT, **PICTURE, "guess_mode": True}, 0),
    ],
    ids=["two transformers", "ControlNet for half of the steps", "ControlNet in guess mode"],
)
def test_steps_that_change_on_the_way(make: Any, options: dict[str, Any], lessons: int, workers: Workers) -> None:
    _, _, report = run_three_ways(make(), options, workers)
    assert not report.sequential
    assert sum(report.notes.values()) == lessons
    assert report.rounds < report.steps


def lora(seed: int) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_v", "to_out.0"])
    torch.manual_seed(seed)
    return config


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_workers_follow_a_lora(workers: Workers) -> None:
    pipe, untouched = sdxl(), sdxl()
    plain = run(untouched, CHEAP)

    def first(pipe: Any) -> None:
        pipe.unet.add_adapter(lora(1), "first")

    def scaled(pipe: Any) -> None:
        pipe.set_adapters("first", 0.5)

    def second(pipe: Any) -> None:
        pipe.unet.add_adapter(lora(2), "second")
        pipe.set_adapters(["first", "second"], [0.7, 1.0])

    def changed(pipe: Any) -> None:
        with torch.no_grad():
            next(p for name, p in pipe.unet.named_parameters() if "lora_B.first" in name).mul_(3)

    def fused(pipe: Any) -> None:
        pipe.fuse_lora(["unet"])

    def unfused(pipe: Any) -> None:
        pipe.unfuse_lora(["unet"])

    def removed(pipe: Any) -> None:
        pipe.unload_lora_weights()

    changes = [first, scaled, second, changed, fused, unfused, removed]
    scale = {"cross_attention_kwargs": {"scale": 0.3}}
    with parallelize(pipe, workers, drafts=1) as parallel:
        for change in changes:
            change(pipe)
            change(untouched)
            drafted = run(pipe, CHEAP)
            assert torch.equal(drafted, run(untouched, CHEAP)), change.__name__
            assert torch.allclose(drafted, plain, rtol=1e-3, atol=1e-3) == (change is removed)
            if change is second:
                assert torch.equal(run(pipe, {**CHEAP, **scale}), run(untouched, {**CHEAP, **scale}))
    assert [call.sequential for call in parallel.report.calls] == [""] * (len(changes) + 1)


def test_a_callback_may_change_the_denoiser(workers: Workers) -> None:
    """Some of diffusers' own callbacks do: what was drafted before is dropped, and workers get the module as it is."""
    pipe, steps = sdxl(), 10
    pipe.unet.add_adapter(lora(1), "first")

    def weaken(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        pipe.set_adapters("first", 1.0 if i < 4 else 0.2)
        return {}

    def call() -> torch.Tensor:
        pipe.set_adapters("first", 1.0)
        return run(pipe, {**CHEAP, "callback_on_step_end": weaken}, steps)

    untouched = call()
    with parallelize(pipe, workers, drafts=1) as parallel:
        assert torch.equal(call(), untouched)
    assert list(parallel.report.calls[0].notes) == ["a step was evaluated without drafts: unet itself was changed"]
    with reference(pipe, devices=3):
        expected = call()
    with parallelize(pipe, workers) as parallel:
        assert torch.equal(call(), expected)
    assert parallel.report.calls[0].rounds < steps


def test_weights_written_in_place_are_seen(workers: Workers) -> None:
    pipe = sdxl()
    with parallelize(pipe, workers, drafts=1):
        run(pipe, CHEAP)
        with torch.no_grad():
            for parameter in pipe.unet.parameters():
                parameter.data.mul_(1.1)
        pipe.unet.conv_in.weight.data = pipe.unet.conv_in.weight.data.clone() * 1.1
        drafted = run(pipe, CHEAP)
    assert torch.equal(run(pipe, CHEAP), drafted)


def test_an_ip_adapter_works(workers: Workers) -> None:
    pipe = sdxl()
    names = [n for n in pipe.unet.attn_processors if n.endswith("attn2.processor")]
    weights: dict[str, Any] = {}
    for number, name in zip(itertools.count(1, 2), names):
        width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        weights[f"{number}.to_k_ip.weight"] = normal(width, 8, seed=number)
        weights[f"{number}.to_v_ip.weight"] = normal(width, 8, seed=number + 1)
    projection = {
        "proj.weight": normal(4 * 8, 8, seed=90) * 0.3,
        "proj.bias": torch.zeros(32),
        "norm.weight": torch.ones(8),
        "norm.bias": torch.zeros(8),
    }
    pipe.unet._load_ip_adapter_weights([{"ip_adapter": weights, "image_proj": projection}])
    options = {**CHEAP, "ip_adapter_image_embeds": [normal(2, 1, 8, seed=5)]}
    untouched = run(pipe, options)
    with parallelize(pipe, workers, drafts=1) as parallel:
        assert torch.equal(run(pipe, options), untouched)
        pipe.set_ip_adapter_scale(0.1)
        weaker = run(pipe, options)
    assert torch.equal(run(pipe, options), weaker)
    assert not torch.equal(weaker, untouched)
    assert not any(call.notes or call.sequential for call in parallel.report.calls)


def in_double(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    torch.set_default_dtype(torch.float64)
    try:
        return call()
    finally:
        torch.set_default_dtype(torch.float32)


def with_exact_attention(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return call()


def with_diffusers_attention(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    with attention_backend("_native_math"):
        return call()


@pytest.mark.parametrize("setting", [in_double, with_exact_attention, with_diffusers_attention])
def test_torchs_settings_are_carried_over(setting: Any, workers: Workers) -> None:
    pipe = sd3()
    options = PIPELINES["SD 3"][1]
    untouched = setting(lambda: run(pipe, options))
    with parallelize(pipe, workers, drafts=1) as parallel:
        assert torch.equal(setting(lambda: run(pipe, options)), untouched)
        run(pipe, options)  # Those of the workers are theirs again.
    assert not any(call.sequential for call in parallel.report.calls)


def test_autocast_runs_sequentially_and_says_why(workers: Workers) -> None:
    pipe = sdxl()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        untouched = run(pipe, CHEAP)
        with parallelize(pipe, workers) as parallel:
            assert torch.equal(run(pipe, CHEAP), untouched)
    assert "autocast" in parallel.report.calls[0].sequential
