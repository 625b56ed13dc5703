"""What a pipeline, a callback or a user may do between and around steps: the bits are right, or the report says why."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    DPMSolverSDEScheduler,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLCoreDenoiseStep,
)
from peft import LoraConfig

from drp.diffusers import Parallel, parallelize, reference
from drp.diffusers.digits import digits_pipeline
from tests.pipelines import IMAGE, PICTURE, PIPELINES, TEXT, image_to_image, run
from tests.tiny.builders import BETAS, flux, normal, pooled, prompts, scheduler, sd15, sdxl, unet

CHEAP = {**prompts(1, 6, 8), **IMAGE}


def euler() -> Any:
    pipe = sd15()
    pipe.scheduler = EulerDiscreteScheduler(**BETAS)
    return pipe


def exact(pipe: Any, call: Callable[[Any], torch.Tensor]) -> Parallel:
    """See that a call with one draft a round has the bits of the untouched pipeline."""
    untouched = call(pipe)
    with reference(pipe) as parallel:
        drafted = call(pipe)
    assert torch.equal(torch.nan_to_num(drafted), torch.nan_to_num(untouched))
    return parallel


def test_a_callback_may_write_to_an_argument_in_place() -> None:
    def halve(pipe: Any, i: int, t: Any, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if i == 3:
            kept["prompt_embeds"].mul_(0.5)
        return kept

    options = {"callback_on_step_end": halve, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    parallel = exact(euler(), lambda pipe: run(pipe, {**prompts(1, 6, 8), **IMAGE, **options}))
    assert "encoder_hidden_states is not what follows" in str(parallel.report)


@torch.no_grad()
def guided(pipe: Any, steps: int = 8, between: Callable[[Any, bool], None] = lambda unet, on: None) -> torch.Tensor:
    """Sample with two calls a step; `between` is called before each with whether it is the conditional one."""
    pipe.scheduler.set_timesteps(steps)
    x, e = normal(1, 4, 8, 8) * pipe.scheduler.init_noise_sigma, normal(2, 6, 8)
    for t in pipe.scheduler.timesteps:
        model_input = pipe.scheduler.scale_model_input(x, t)
        outputs = []
        for number in (0, 1):
            between(pipe.unet, number == 1)
            outputs.append(pipe.unet(model_input, t, encoder_hidden_states=e[number : number + 1]).sample)
        x = pipe.scheduler.step(outputs[0] + 5 * (outputs[1] - outputs[0]), t, x, return_dict=False)[0]
    return torch.as_tensor(x)


def test_a_callback_may_add_a_hook_to_a_part_of_the_denoiser() -> None:
    pipe = euler()

    def call(pipe: Any) -> torch.Tensor:
        handles = []

        def hook(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
            if i == 2:
                handles.append(pipe.unet.mid_block.register_forward_hook(lambda module, args, result: result * 0.5))
            return {}

        made = run(pipe, {**CHEAP, "callback_on_step_end": hook})
        handles[0].remove()
        return made

    parallel = exact(pipe, call)
    assert parallel.report.calls[0].sequential.startswith("UNet2DConditionModel.mid_block has forward hooks")


def test_a_module_that_is_another_for_each_branch_is_not_drafted() -> None:
    pipe = euler()
    torch.manual_seed(3)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))

    def toggle(unet: Any, on: bool) -> None:
        (unet.enable_adapters if on else unet.disable_adapters)()

    parallel = exact(pipe, lambda pipe: guided(pipe, between=toggle))
    assert parallel.report.calls[0].sequential == "unet itself is changed between two calls of one step"
    with reference(pipe, devices=2, mode="aggressive") as parallel:
        guided(pipe)
    assert parallel.report.calls[0].rounds == 5


def test_a_pipeline_may_copy_its_scheduler_for_a_second_kind_of_latents() -> None:
    @torch.no_grad()
    def call(pipe: Any) -> torch.Tensor:
        pipe.scheduler.set_timesteps(8)
        second = copy.deepcopy(pipe.scheduler)
        x, y, e = normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=5), normal(1, 6, 8)
        for t in pipe.scheduler.timesteps:
            v = pipe.unet(pipe.scheduler.scale_model_input(x, t), t, encoder_hidden_states=e).sample
            x = pipe.scheduler.step(v, t, x).prev_sample
            second.scale_model_input(y, t)
            y = second.step(v * 0.5, t, y).prev_sample
        return torch.cat([x, y])

    pipe = euler()
    assert not exact(pipe, call).report.calls[0].sequential
    with reference(pipe, devices=2, mode="aggressive") as parallel:
        call(pipe)
    assert parallel.report.calls[0].rounds == 5


def test_a_pipeline_that_steps_its_scheduler_twice_for_one_evaluation_is_sequential() -> None:
    """As Cosmos does, to have the estimate of the data before guidance."""

    @torch.no_grad()
    def call(pipe: Any) -> torch.Tensor:
        pipe.scheduler.set_timesteps(8)
        x, e = normal(1, 4, 8, 8), normal(1, 6, 8, seed=2)
        for t in pipe.scheduler.timesteps:
            v = pipe.unet(pipe.scheduler.scale_model_input(x, t), t, encoder_hidden_states=e).sample
            data = pipe.scheduler.step(v, t, x).pred_original_sample
            pipe.scheduler._step_index -= 1
            x = pipe.scheduler.step(v, t, x).prev_sample + 0.01 * data
        return torch.as_tensor(x)

    pipe = euler()
    untouched = call(pipe)
    with reference(pipe, devices=3, mode="aggressive") as parallel:
        assert torch.equal(call(pipe), untouched)
    (report,) = parallel.report.calls
    assert report.steps == report.rounds == report.evaluations == 8
    assert "does not follow the one before" in report.sequential


def test_values_that_are_not_finite_run_sequentially_and_say_so() -> None:
    pipe = euler()
    pipe.unet.conv_out.bias.data[0] = float("nan")
    assert "not finite" in exact(pipe, lambda pipe: run(pipe, CHEAP)).report.calls[0].sequential


def test_what_drafting_raises_is_reported_and_the_call_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = euler()
    untouched = run(pipe, CHEAP)

    def fail(*args: Any) -> None:
        raise ZeroDivisionError("nothing to divide by")

    monkeypatch.setattr("drp.diffusers.rounds.outputs_as_branches", fail)
    with reference(pipe, devices=3, mode="aggressive") as parallel:
        assert torch.equal(run(pipe, CHEAP), untouched)
    (report,) = parallel.report.calls
    assert report.sequential == "drafting failed: ZeroDivisionError: nothing to divide by"
    assert report.steps == report.rounds
    assert "nothing to divide by" in caplog.text
    weights = weakref.ref(pipe.unet)
    del pipe, parallel
    gc.collect()
    assert weights() is None, "log records, which handlers may keep, keep the pipeline"


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, KDPM2DiscreteScheduler, KDPM2AncestralDiscreteScheduler])
@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_timesteps_that_come_twice(kind: Any, strength: float) -> None:
    pipe = image_to_image()
    pipe.scheduler = scheduler(kind)
    options = {**TEXT, **PICTURE, "strength": strength, "num_inference_steps": 10}
    exact(pipe, lambda pipe: run(pipe, options))
    with reference(pipe, devices=2, mode="aggressive") as parallel:
        run(pipe, options)
    (report,) = parallel.report.calls
    assert report.rounds <= report.steps // 2 + 1
    assert not any("anew" in note for note in report.notes)


@pytest.mark.parametrize("strength", [0.3, 0.9])
def test_image_to_image_with_pndm(strength: float) -> None:
    pipe = image_to_image()
    pipe.scheduler = scheduler(PNDMScheduler, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    options = {**TEXT, **PICTURE, "strength": strength, "num_inference_steps": 20}
    with reference(pipe, devices=2, mode="aggressive") as parallel:
        run(pipe, options)
    (report,) = parallel.report.calls
    assert report.rounds <= report.steps // 2 + 1


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverSDEScheduler])
def test_schedulers_that_take_no_generator(kind: Any) -> None:
    def call(pipe: Any) -> torch.Tensor:
        torch.manual_seed(0)
        images: torch.Tensor = pipe([3, 1], 8, generator=torch.Generator().manual_seed(0)).images
        return images

    options = {"noise_sampler_seed": 0} if kind is DPMSolverSDEScheduler else {}
    pipe = digits_pipeline(kind(**BETAS, **options))
    pipe.set_progress_bar_config(disable=True)
    exact(pipe, call)
    with reference(pipe, devices=2, mode="aggressive") as parallel:
        call(pipe)
    assert parallel.report.calls[0].rounds < parallel.report.calls[0].steps


def test_a_call_from_another_thread_before_one_has_ended_is_refused() -> None:
    pipe = euler()
    expected = run(pipe, CHEAP)
    reached, done = threading.Event(), threading.Event()
    raised: list[BaseException] = []

    def wait(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if i == 2:
            reached.set()
            assert done.wait(60)
        return {}

    def first() -> None:
        try:
            run(pipe, {**CHEAP, "callback_on_step_end": wait})
        except RuntimeError as error:
            raised.append(error)

    with reference(pipe):
        thread = threading.Thread(target=first)
        thread.start()
        assert reached.wait(60)
        second = run(pipe, CHEAP)
        done.set()
        thread.join(60)
        assert torch.equal(run(pipe, CHEAP), expected)  # one after the other, in whatever thread
    assert torch.equal(second, expected)
    assert "called from another thread" in str(raised[0])


def test_a_patched_class_is_not_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers would import it as it is in its module. TeaCache, ToMe and others patch so."""
    original = UNet2DConditionModel.forward

    @functools.wraps(original)
    def patched(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, sample * 0.9, *args, **kwargs)

    pipe = euler()
    untouched = run(pipe, CHEAP)
    with reference(pipe) as parallel:
        assert torch.equal(run(pipe, CHEAP), untouched)
        monkeypatch.setattr(UNet2DConditionModel, "forward", patched)
        drafted = run(pipe, CHEAP)
    assert torch.equal(drafted, run(pipe, CHEAP))
    first, second = parallel.report.calls
    assert not first.sequential
    assert "UNet2DConditionModel.forward was replaced in the class" in second.sequential


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FirstBlockCacheConfig(threshold=0.1), "FirstBlockCache enabled"),
        (TaylorSeerCacheConfig(), "TaylorSeerCache enabled"),
        (
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2,
                spatial_attention_timestep_skip_range=(100, 800),
                current_timestep_callback=lambda: 500,
            ),
            "PyramidAttentionBroadcast enabled",
        ),
    ],
)
def test_caches_are_refused_by_their_name_and_may_be_removed(config: Any, message: str) -> None:
    pipe = flux()
    options = PIPELINES["Flux"][1]
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match=rf"{message}.*disable_cache\(\)"), parallelize(pipe, 1):
        pass
    pipe.transformer.disable_cache()
    assert not exact(pipe, lambda pipe: run(pipe, options)).report.calls[0].sequential
    with reference(pipe) as parallel:
        pipe.transformer.enable_cache(config)
        run(pipe, options)
    assert message in parallel.report.calls[0].sequential


def test_group_offloading_is_refused_by_its_name() -> None:
    pipe = flux()
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="group offloading"), parallelize(pipe, 1):
        pass


def test_a_denoiser_may_be_replaced_by_another() -> None:
    """Between two calls, and by a callback in the middle of one."""
    pipe, first = euler(), unet()
    second = unet(layers_per_block=2)

    def replace_denoiser(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        pipe.unet = second if i >= 3 else first
        return {}

    def call(pipe: Any) -> torch.Tensor:
        pipe.unet = first
        return run(pipe, {**CHEAP, "callback_on_step_end": replace_denoiser})

    # The callback comes after the scheduler's step: one step is not seen.
    assert list(exact(pipe, call).report.calls[0].notes) == ["a step was evaluated without drafts: unet was not called"]
    with reference(pipe, devices=2, mode="aggressive") as parallel:
        call(pipe)
    assert not parallel.report.calls[0].sequential
    assert parallel.report.calls[0].rounds < parallel.report.calls[0].steps
    assert "forward" not in {**vars(first), **vars(second)}


@pytest.mark.parametrize(
    ("interval", "steps", "rounds", "changes"), [({}, 7, 3, 0), ({"start": 0.3, "stop": 0.7}, 20, 11, 2)]
)
def test_a_modular_pipeline_with_a_guider(interval: dict[str, float], steps: int, rounds: int, changes: int) -> None:
    """In an interval of guidance the number of calls changes twice, and drafts go on."""
    parts = sdxl()
    pipe = StableDiffusionXLCoreDenoiseStep().init_pipeline()
    guider = ClassifierFreeGuidance(guidance_scale=5.0, **interval)
    pipe.update_components(unet=parts.unet, scheduler=parts.scheduler, vae=parts.vae, guider=guider)
    pipe.set_progress_bar_config(disable=True)

    def call(pipe: Any) -> torch.Tensor:
        size = {"height": 16, "width": 16}
        options = {**prompts(1, 6, 8), **pooled(), **size, "num_inference_steps": steps, "output": "latents"}
        return torch.as_tensor(pipe(**options, generator=torch.Generator().manual_seed(0)))

    assert not exact(pipe, call).report.calls[0].sequential
    with reference(pipe, devices=3, mode="aggressive") as parallel:
        call(pipe)
    (report,) = parallel.report.calls
    assert (report.rounds, report.sequential) == (rounds, "")
    assert sum(n for note, n in report.notes.items() if "evaluated without drafts" in note) == changes
