"""Pipelines with every scheduler of diffusers: what is drafted, what is refused, and drp's own solvers beside them."""

from __future__ import annotations

import itertools
from typing import Any

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

import drp
from drp.diffusers import Workers
from drp.diffusers.digits import digits_pipeline
from drp.diffusers.scheduler import SchedulerLevels, adds_noise
from drp.sampling.drafts import STEADY
from drp.sampling.mode_selection import DEFAULT_TOLERANCE
from tests.drafting import CHEAP, digits_noise, parallelize, reference
from tests.pipelines import PIPELINES, run
from tests.rounds import rounds_of
from tests.tiny.builders import BETAS, cogvideo, normal, sdxl


@pytest.fixture
def workers(pipeline_workers: Workers) -> Workers:
    return pipeline_workers


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
    assert bool(report.notes) == (name in UNKNOWN)


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
    tolerance = 0.02 if mode == "adaptive" else DEFAULT_TOLERANCE
    own = drp.reference(
        labels=labels,
        steps=12,
        solver=solver,
        grid={"spacing": "trailing"},
        mode=mode,
        drafts=4,
        rule=rule,
        tolerance=tolerance,
    )
    kind = {"euler": EulerDiscreteScheduler, "dpmsolver++": DPMSolverMultistepScheduler}[solver]
    pipe = digits_pipeline(kind(**BETAS, **options))
    pipe.set_progress_bar_config(disable=True)
    with reference(pipe, devices=4, mode=mode, rule=rule, tolerance=tolerance) as parallel:
        images = pipe(labels, 12, latents=digits_noise(1)).images
    assert float((images - own.samples).norm() / own.samples.norm()) < 1e-5
    assert parallel.report.calls[0].rounds == own.rounds


def test_the_scheduler_may_be_replaced_between_calls(workers: Workers) -> None:
    pipe = sdxl()
    with parallelize(pipe, workers, drafts=1) as parallel:
        run(pipe, CHEAP)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        drafted = run(pipe, CHEAP)
    assert torch.equal(run(pipe, CHEAP), drafted)
    assert [call.steps for call in parallel.report.calls] == [7, 7]
    assert "step" not in vars(pipe.scheduler)


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
