"""Pipelines of diffusers through `parallelize`: the real classes, small random weights, real worker processes."""

from __future__ import annotations

import copy
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

import drp
from drp import diffusers as face
from drp.diffusers import CallReport, Workers
from drp.diffusers.denoisers import DENOISERS
from drp.diffusers.digits import digits_pipeline
from drp.diffusers.scheduler import SchedulerLevels, adds_noise
from drp.diffusers.structure import describe
from drp.sampling.drafts import STEADY
from drp.sampling.mode_wrappers import PicardSweeps
from drp.sampling.modes import Aggressive
from tests.pipelines import (
    BETAS,
    IMAGE,
    PICTURE,
    PIPELINES,
    TEXT,
    VARIANTS,
    MixingConv,
    cogvideo,
    controlled,
    normal,
    pooled,
    prompts,
    run,
    sd3,
    sdxl,
    wan22,
)
from tests.rounds import rounds_of
from training.classifier import load_classifier

pytestmark = [
    # diffusers hands tensors to numpy in a way that numpy means to forbid.
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Should have ta>=t0:UserWarning"),  # torchsde, of rounding
]


def parallelize(pipe: Any, devices: Any, mode: Any = "aggressive", **options: Any) -> Any:
    """In the mode that most tests count the rounds of; two workers evaluate three drafts a round."""
    if isinstance(devices, Workers) and len(devices.devices) == 2:
        options.setdefault("drafts", 3)
    return face.parallelize(pipe, devices, mode, **options)


def reference(pipe: Any, *, mode: Any = "aggressive", **options: Any) -> Any:
    return face.reference(pipe, mode=mode, **options)


def told(report: CallReport) -> Counter[str]:
    """The notes of a call but the advice to take more steps: tests take few."""
    return Counter(
        {note: n for note, n in report.notes.items() if "too few for drafting" not in note and "are many" not in note}
    )


EVERY = {**PIPELINES, **VARIANTS}
CHEAP = {**prompts(1, 6, 8), **pooled(), **IMAGE}


@pytest.fixture
def workers(pipeline_workers: Workers) -> Workers:
    return pipeline_workers


@pytest.fixture(scope="module")
def one_worker() -> Iterator[Workers]:
    with Workers(1, threads=1) as made:
        yield made


@pytest.fixture(scope="module", params=[3, 4])
def other_workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    with Workers(request.param, threads=1) as made:
        yield made


def attributes(pipe: Any) -> dict[str, Any]:
    """What a user could see of a pipeline: what its components hold, and the weights."""
    seen: dict[str, Any] = {"pipe": dict(vars(pipe))}
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            seen[name] = {path: dict(vars(module)).keys() for path, module in component.named_modules()}
            seen[f"{name}, weights"] = {key: value.clone() for key, value in component.state_dict().items()}
        elif component is not None:
            seen[name] = dict(vars(component))
    return seen


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", EVERY)
def test_one_draft_a_round_is_the_untouched_pipeline(name: str, workers: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    expected = run(pipe, options)
    with parallelize(pipe, workers, drafts=1) as parallel:
        assert torch.equal(run(pipe, options), expected)
    (report,) = parallel.report.calls
    assert report.rounds == report.evaluations == report.steps > 3
    assert not report.sequential
    assert not told(report)


@pytest.mark.diffusers
@pytest.mark.parametrize("name", EVERY)
def test_one_device_is_the_untouched_pipeline(name: str, one_worker: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    expected = run(pipe, options)
    with parallelize(pipe, one_worker) as parallel:
        assert torch.equal(run(pipe, options), expected)
    assert not parallel.report.calls[0].sequential


def conservative(name: str) -> Any:
    """Four of them in the ordinary tests; what is rounds and what is the pipeline are apart."""
    marks = [] if name in ("SDXL", "Flux", "Wan", "ControlNet") else [pytest.mark.diffusers]
    return pytest.param(name, "conservative", marks=marks)


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "aggressive") for name in EVERY), *(conservative(name) for name in EVERY)]
)
def test_workers_have_the_bits_of_one_process(name: str, mode: str, workers: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    with reference(pipe, devices=3, mode=mode):
        expected = run(pipe, options)
    steps: list[int] = []

    def note(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        steps.append(i)
        return {}

    callback: dict[str, Any] = {"callback_on_step_end": note}
    if name in ("PixArt", "DiT"):  # The one has an older kind, the other none.
        callback = {"callback": lambda i, t, latents: steps.append(i)} if name == "PixArt" else {}
    with parallelize(pipe, workers, mode) as parallel:
        assert torch.equal(run(pipe, {**options, **callback}), expected)
    (report,) = parallel.report.calls
    assert report.rounds == rounds_of(mode, report.steps, 3)
    assert report.evaluations == report.steps
    assert not report.sequential
    assert not told(report)
    if callback:
        assert steps == list(range(report.steps))


@pytest.mark.diffusers
@pytest.mark.parametrize("mode", ["aggressive", "conservative"])
@pytest.mark.parametrize("name", EVERY)
def test_other_numbers_of_workers(name: str, mode: str, other_workers: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    n = len(other_workers.devices)
    with reference(pipe, devices=n, mode=mode):
        expected = run(pipe, options)
    with parallelize(pipe, other_workers, mode, drafts=n) as parallel:
        assert torch.equal(run(pipe, options), expected)
    (report,) = parallel.report.calls
    assert report.rounds == rounds_of(mode, report.steps, n)


SCHEDULERS: dict[str, Any] = {
    "DDIM": lambda: DDIMScheduler(**BETAS, clip_sample=False),
    "DDIM, clipped": lambda: DDIMScheduler(**BETAS, clip_sample=True),
    "DDPM": lambda: DDPMScheduler(**BETAS, clip_sample=False),
    "PNDM": lambda: PNDMScheduler(**BETAS, skip_prk_steps=True),
    "Euler": lambda: EulerDiscreteScheduler(**BETAS),
    "Euler, karras, v": lambda: EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True, prediction_type="v_prediction"),
    "Euler ancestral": lambda: EulerAncestralDiscreteScheduler(**BETAS),
    "Heun": lambda: HeunDiscreteScheduler(**BETAS),
    "LMS": lambda: LMSDiscreteScheduler(**BETAS),
    "KDPM2": lambda: KDPM2DiscreteScheduler(**BETAS),
    "DPM++ 2M": lambda: DPMSolverMultistepScheduler(**BETAS),
    "DPM++ 2M SDE": lambda: DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++"),
    "DPM++ SDE": lambda: DPMSolverSDEScheduler(**BETAS, noise_sampler_seed=0),
    "DPM++ 2S": lambda: DPMSolverSinglestepScheduler(**BETAS, lower_order_final=True),
    "DEIS": lambda: DEISMultistepScheduler(**BETAS),
    "UniPC": lambda: UniPCMultistepScheduler(**BETAS),
    "LCM": lambda: LCMScheduler(**BETAS),
    "SA": lambda: SASolverScheduler(**BETAS),
    "TCD": lambda: TCDScheduler(**BETAS),
}

UNKNOWN = ("DDIM, clipped", "KDPM2")
REFUSED = {
    "DDIM, clipped": "DDIMScheduler clips the estimate of the data",
    "LCM": "LCMScheduler makes new noise",
    "TCD": "TCDScheduler makes new noise",
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_drafts(name: str, workers: Workers) -> None:
    pipe = sdxl()
    pipe.scheduler = SCHEDULERS[name]()
    untouched = run(pipe, CHEAP, steps=9)
    with reference(pipe, devices=3, mode="aggressive", always_draft=True):
        expected = run(pipe, CHEAP, steps=9)
    with parallelize(pipe, workers, "aggressive", always_draft=name in REFUSED) as parallel:
        assert torch.equal(run(pipe, CHEAP, steps=9), expected)
    (report,) = parallel.report.calls
    assert report.rounds == rounds_of("aggressive", report.steps, 3)
    assert not report.sequential
    if name in REFUSED:
        with reference(pipe, devices=3, mode="aggressive") as parallel:
            assert torch.equal(run(pipe, CHEAP, steps=9), untouched)
        assert REFUSED[name] in parallel.report.calls[0].sequential
    assert not torch.equal(expected, untouched)
    assert bool(told(report)) == (name in UNKNOWN)


FLOWS: dict[str, Any] = {
    "flow, Euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow, Heun": FlowMatchHeunDiscreteScheduler,
    "flow, UniPC": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}


@pytest.mark.parametrize("name", [*(n for n in SCHEDULERS if n not in UNKNOWN), *FLOWS])
def test_the_estimate_of_the_data_is_the_schedulers_own(name: str) -> None:
    """A scheduler that is always told the same data, in whatever the model predicts, ends at that data."""
    scheduler = (SCHEDULERS | FLOWS)[name]()
    scheduler.set_timesteps(12)
    data = normal(1, 4, 8, 8, seed=3)
    levels = SchedulerLevels(scheduler, scheduler.timesteps)
    assert levels.known
    x = normal(1, 4, 8, 8) * getattr(scheduler, "init_noise_sigma", 1.0)
    for k, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        at_state, at_output = levels.factors(k)
        x = scheduler.step((data - at_state * x) / at_output, t, x).prev_sample
    assert float((x - data).norm() / data.norm()) < 0.06


def digits_noise(count: int) -> torch.Tensor:
    """The noise of `drp.sample` with seed 0."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randn(1, 28, 28, generator=generator) for _ in range(count)])


@pytest.mark.parametrize(
    ("mode", "rule", "solver"),
    [  # A solver is rows of coefficients to modes and rules: with the second solver each of them once.
        ("sequential", "paper", "euler"),
        *itertools.product(("aggressive", "conservative"), ("paper", "secant"), ("euler",)),
        *itertools.product(("window", "adaptive"), ("paper", "damped"), ("euler",)),
        ("sequential", "paper", "dpmsolver++"),
        ("aggressive", "paper", "dpmsolver++"),
        ("conservative", "secant", "dpmsolver++"),
        ("window", "damped", "dpmsolver++"),
        ("adaptive", "damped", "dpmsolver++"),
    ],
)
def test_drafts_are_those_of_drps_own_solvers(mode: str, rule: str, solver: str) -> None:
    labels, options = [3], {"timestep_spacing": "trailing"}
    own = drp.reference(
        labels=labels,
        steps=12,
        solver=solver,
        grid={"spacing": "trailing"},
        mode=mode,
        drafts=4,
        rule=rule,
        tolerance=0.02,
    )
    kind = {"euler": EulerDiscreteScheduler, "dpmsolver++": DPMSolverMultistepScheduler}[solver]
    pipe = digits_pipeline(kind(**BETAS, **options))
    pipe.set_progress_bar_config(disable=True)
    with reference(pipe, devices=4, mode=mode, rule=rule, tolerance=0.02) as parallel:
        images = pipe(labels, 12, latents=digits_noise(1)).images
    assert float((images - own.samples).norm() / own.samples.norm()) < 1e-5
    assert parallel.report.calls[0].rounds == own.rounds


def test_digits_are_as_asked(workers: Workers) -> None:
    labels = list(range(10))
    pipe = digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with parallelize(pipe, workers):
        images = pipe(labels, 20, latents=digits_noise(10)).images
    assert float((load_classifier()(images).argmax(1) == torch.tensor(labels)).float().mean()) >= 0.9


@contextmanager
def left_as_it_was(pipe: Any, options: dict[str, Any]) -> Iterator[None]:
    """See that a block changes nothing of a pipeline that a user could see; weights may move, those that are shared."""
    run(pipe, options)  # A first call leaves traces of its own.
    before, config, places = attributes(pipe), copy.deepcopy(pipe.config), where_the_rest_lies(pipe)
    yield
    after = attributes(pipe)
    assert before["pipe"].keys() == after["pipe"].keys()
    assert all(before["pipe"][name] is after["pipe"][name] for name in pipe.components)
    assert pipe.config == config
    assert list(before) == list(after)
    for name in before:
        if name != "pipe":
            assert same(before[name], after[name]), name
    assert places == where_the_rest_lies(pipe)


def where_the_rest_lies(pipe: Any) -> list[int]:
    """Return the places in memory of the weights that workers have no use for."""
    modules = {name: each for name, each in pipe.components.items() if isinstance(each, torch.nn.Module)}
    return [p.data_ptr() for name, each in modules.items() if name not in DENOISERS for p in each.parameters()]


def test_the_pipeline_is_left_as_it_was() -> None:
    pipe, processes = sdxl(), psutil.Process().children()
    with left_as_it_was(pipe, CHEAP):
        with parallelize(pipe, 1, threads=1):
            run(pipe, CHEAP)
            assert "forward" in vars(pipe.unet)
            assert len(psutil.Process().children()) == len(processes) + 1
        assert psutil.Process().children() == processes


@pytest.mark.diffusers
@pytest.mark.parametrize("name", ["SD 3", "Flux", "Wan", "ControlNet"])
def test_pipelines_of_other_families_are_left_as_they_were(name: str, one_worker: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    with left_as_it_was(pipe, options), parallelize(pipe, one_worker, drafts=1) as parallel:
        run(pipe, options)  # with the bits of the call before, which schedulers remember
    (report,) = parallel.report.calls
    assert report.rounds == report.steps > 3
    assert not report.sequential


def test_an_error_of_the_pipeline_passes_through(workers: Workers) -> None:
    pipe = sdxl()

    def fail(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if i == 3:
            raise ZeroDivisionError("mine")
        return {}

    expected = run(pipe, CHEAP)
    with parallelize(pipe, workers, drafts=1):
        with pytest.raises(ZeroDivisionError, match="mine"):
            run(pipe, {**CHEAP, "callback_on_step_end": fail})
        assert torch.equal(run(pipe, CHEAP), expected)
    assert "forward" not in vars(pipe.unet)


def test_several_calls_of_different_sizes_and_steps(workers: Workers) -> None:
    pipe = sdxl()
    calls = [(7, CHEAP), (10, {**CHEAP, "height": 32}), (4, {**CHEAP, "guidance_scale": 1.0}), (1, CHEAP)]
    with reference(pipe, devices=3):
        expected = [run(pipe, options, steps) for steps, options in calls]
    with parallelize(pipe, workers) as parallel:
        for (steps, options), samples in zip(calls, expected, strict=True):
            assert torch.equal(run(pipe, options, steps), samples)
    assert [call.rounds for call in parallel.report.calls] == [rounds_of("aggressive", n, 3) for n, _ in calls]
    assert str(parallel.report).count("speed-up") == 4


@pytest.mark.diffusers
def test_a_lost_worker_is_replaced_and_the_bits_stay() -> None:
    pipe = sdxl()
    with reference(pipe, devices=2):
        expected = run(pipe, CHEAP)
    before = set(psutil.Process().children())

    def kill(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if i == 2:
            min(set(psutil.Process().children()) - before, key=lambda worker: worker.pid).kill()
        return {}

    with parallelize(pipe, 2, threads=1) as parallel:
        assert torch.equal(run(pipe, {**CHEAP, "callback_on_step_end": kill}), expected)
        assert torch.equal(run(pipe, CHEAP), expected)
    assert any("SIGKILL" in note for note in told(parallel.report.calls[0]))


def test_two_pipelines_at_once(workers: Workers) -> None:
    first, second = sdxl(), sd3()
    options = PIPELINES["SD 3"][1]
    with reference(first, devices=3), reference(second, devices=3):
        expected = run(first, CHEAP), run(second, options)
    with parallelize(first, workers), parallelize(second, workers):
        assert torch.equal(run(first, CHEAP), expected[0])
        assert torch.equal(run(second, options), expected[1])
        assert torch.equal(run(first, CHEAP), expected[0])


def test_the_scheduler_may_be_replaced_between_calls(workers: Workers) -> None:
    pipe = sdxl()
    with parallelize(pipe, workers, drafts=1) as parallel:
        run(pipe, CHEAP)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        drafted = run(pipe, CHEAP)
    assert torch.equal(run(pipe, CHEAP), drafted)
    assert [call.steps for call in parallel.report.calls] == [7, 7]
    assert "step" not in vars(pipe.scheduler)


def test_interrupt_ends_the_call(workers: Workers) -> None:
    pipe = sdxl()

    def stop(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i >= 2
        return {}

    with parallelize(pipe, workers, drafts=1) as parallel:
        drafted = run(pipe, {**CHEAP, "callback_on_step_end": stop})
    assert torch.equal(run(pipe, {**CHEAP, "callback_on_step_end": stop}), drafted)
    assert parallel.report.calls[0].steps == 3


def test_a_callback_may_nudge_the_latents(workers: Workers) -> None:
    pipe = sdxl()

    def nudge(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        return {"latents": kept["latents"] * 1.01}

    options = {**CHEAP, "callback_on_step_end": nudge}
    untouched = run(pipe, options)
    with parallelize(pipe, workers, drafts=1):
        assert torch.equal(run(pipe, options), untouched)
    with reference(pipe, devices=3):
        expected = run(pipe, options)
    with parallelize(pipe, workers) as parallel:
        assert torch.equal(run(pipe, options), expected)
    assert parallel.report.calls[0].rounds == rounds_of("aggressive", 7, 3)
    assert float((expected - untouched).norm() / untouched.norm()) < 0.1


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
    assert "drafts were given up: the latents were replaced between two steps" in told(report)
    assert report.rounds == 1 + 2 + 1 + 2  # steps 0, 1-3 and 4-6, of which 5 and 6 are dropped; then 5, 6-8 and 9


def test_guidance_may_end_on_the_way(workers: Workers) -> None:
    """The denoiser's batch is halved in the middle: the step is learned from anew, and drafts go on."""
    pipe = sdxl()

    def end_guidance(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if i != 3:
            return {}
        pipe._guidance_scale = 0.0
        return {name: value.chunk(2)[-1] for name, value in kept.items() if name != "latents"}

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    options = {**CHEAP, "callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": names}
    untouched = run(pipe, options, steps=10)
    with parallelize(pipe, workers, drafts=1) as parallel:
        assert torch.equal(run(pipe, options, steps=10), untouched)
    with reference(pipe, devices=3):
        expected = run(pipe, options, steps=10)
    with parallelize(pipe, workers) as parallel:
        assert torch.equal(run(pipe, options, steps=10), expected)
    (report,) = parallel.report.calls
    assert not report.sequential
    assert sum(told(report).values()) == 1
    assert report.rounds < 10


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
    pipe = make()
    untouched = run(pipe, options)
    with parallelize(pipe, workers, drafts=1):
        assert torch.equal(run(pipe, options), untouched)
    with reference(pipe, devices=3):
        expected = run(pipe, options)
    with parallelize(pipe, workers) as parallel:
        assert torch.equal(run(pipe, options), expected)
    (report,) = parallel.report.calls
    assert not report.sequential
    assert sum(told(report).values()) == lessons
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
    assert list(told(parallel.report.calls[0])) == ["a step was evaluated without drafts: unet itself was changed"]
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
    assert not any(told(call) or call.sequential for call in parallel.report.calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, workers: Workers) -> None:
    pipe = sdxl()
    pipe.to(dtype)
    options = {n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in CHEAP.items()}
    untouched = run(pipe, options)
    with parallelize(pipe, workers, drafts=1):
        assert torch.equal(run(pipe, options), untouched)
    with reference(pipe, devices=3):
        expected = run(pipe, options)
    with parallelize(pipe, workers):
        assert torch.equal(run(pipe, options), expected)


def test_weights_in_another_memory_format_keep_their_bits(workers: Workers) -> None:
    pipe = sdxl()
    pipe.unet.to(memory_format=torch.channels_last)
    untouched = run(pipe, CHEAP)
    with parallelize(pipe, workers, drafts=1):
        assert torch.equal(run(pipe, CHEAP), untouched)


def test_adaptive_goes_from_sequential_to_aggressive(workers: Workers) -> None:
    pipe = sdxl()
    untouched = run(pipe, CHEAP, steps=12)
    with parallelize(pipe, workers, "aggressive"):
        aggressive = run(pipe, CHEAP, steps=12)
    for tolerance, expected in ((0.0, untouched), (1e9, aggressive)):
        with parallelize(pipe, workers, "adaptive", tolerance=tolerance):
            assert torch.equal(run(pipe, CHEAP, steps=12), expected)
    with parallelize(pipe, workers, "adaptive", tolerance=0.01) as parallel:
        drafted = run(pipe, CHEAP, steps=12)
    (report,) = parallel.report.calls
    assert rounds_of("aggressive", 12, 3) < report.rounds < 12
    assert float((drafted - untouched).norm()) < float((aggressive - untouched).norm())


BATCHES = [
    "SD 1.5",
    "SD 2.1",
    "SDXL",
    "SD 3",
    "PixArt",
    "Sana",
    "LTX-Video",
    "CogVideoX",
    "ControlNet",
    "wider than high",
]
CALLS = ["Flux, true CFG", "Qwen-Image", "Wan"]


@pytest.mark.parametrize("name", [*BATCHES, *CALLS])
def test_the_branches_of_guidance_on_different_devices(name: str, workers: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    with parallelize(pipe, workers, drafts=2):
        together = run(pipe, options)
    with reference(pipe, devices=4, split_guidance=True):
        expected = run(pipe, options)
    with parallelize(pipe, workers, drafts=2, split_guidance=True) as parallel:
        apart = run(pipe, options)
    (report,) = parallel.report.calls
    assert torch.equal(apart, expected)
    assert not told(report)
    assert report.rounds == rounds_of("aggressive", report.steps, 2)
    assert report.evaluations == report.steps
    if name in CALLS:
        assert torch.equal(apart, together)
    assert float((apart - together).norm() / together.norm()) < 1e-4


@pytest.mark.parametrize("name", ["Flux", "DiT", "two in a batch, no guidance"])
def test_guidance_without_branches_is_not_split_and_says_so(name: str, workers: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    with parallelize(pipe, workers, drafts=2):
        together = run(pipe, options)
    with parallelize(pipe, workers, drafts=2, split_guidance=True) as parallel:
        assert torch.equal(run(pipe, options), together)
    assert [note.partition(":")[0] for note in told(parallel.report.calls[0])] == ["guidance was not split"]


def test_a_batch_whose_halves_depend_on_each_other_is_not_split(workers: Workers) -> None:
    pipe = sdxl()
    pipe.unet.conv_out = MixingConv(pipe.unet.conv_out)
    with parallelize(pipe, workers, drafts=2):
        together = run(pipe, CHEAP)
    with parallelize(pipe, workers, drafts=2, split_guidance=True) as parallel:
        assert torch.equal(run(pipe, CHEAP), together)
    assert list(told(parallel.report.calls[0])) == [
        "guidance was not split: the halves of the batch depend on each other"
    ]


def test_warmup_and_sequential(workers: Workers) -> None:
    pipe = sdxl()
    untouched = run(pipe, CHEAP)
    with parallelize(pipe, workers, "sequential") as parallel:
        assert torch.equal(run(pipe, CHEAP), untouched)
    assert parallel.report.calls[0].rounds == 7
    with parallelize(pipe, workers, warmup=3) as parallel:
        run(pipe, CHEAP)
    assert parallel.report.calls[0].rounds == 3 + rounds_of("aggressive", 4, 3)


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


def test_a_scheduler_that_takes_the_estimate_of_the_step_before(workers: Workers) -> None:
    pipe = cogvideo()
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    options = PIPELINES["CogVideoX"][1]
    untouched = run(pipe, options)
    with parallelize(pipe, workers, drafts=1):
        assert torch.equal(run(pipe, options), untouched)
    with reference(pipe, devices=3, mode="aggressive"):
        expected = run(pipe, options)
    with parallelize(pipe, workers, "aggressive") as parallel:
        assert torch.equal(run(pipe, options), expected)
    (report,) = parallel.report.calls
    assert report.rounds == rounds_of("aggressive", report.steps, 3)


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
        ({"denoisers": ["transformer"]}, "lacks transformer"),
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


def test_schedulers_that_add_noise_have_defaults_of_their_own() -> None:
    noisy = {name for name, make in SCHEDULERS.items() if adds_noise(make())}
    assert noisy == {"DDPM", "Euler ancestral", "DPM++ 2M SDE", "DPM++ SDE", "SA"}
    pipe = digits_pipeline()
    pipe.scheduler = SCHEDULERS["Euler ancestral"]()
    images = []
    options: dict[str, Any]
    fewest = {"target_rounds": 4}  # in which no step is evaluated twice
    for options in (
        *({}, {"stride": 2.5, "rule": STEADY}, {"rule": "damped"}),
        *(fewest, {"stride": 4, "rule": "paper"}, {"stride": 4, "rule": STEADY}),
    ):
        with reference(pipe, devices=4, mode="window", **options):
            images.append(pipe([3], 13, generator=torch.Generator().manual_seed(1)).images)
    for chosen, named, other in (images[:3], images[3:]):
        assert torch.equal(chosen, named)
        assert not torch.equal(chosen, other)


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
