"""Every solver of one step, sequential, against its diffusers scheduler over whole runs, and grids of all kinds."""

import itertools
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from drp.sampling.grids import dynamic_mu, flow_grid, make_grid
from drp.sampling.linear import state
from drp.sampling.modes import Sequential
from drp.sampling.reference import run_reference
from drp.sampling.registry import make_solver
from drp.sampling.schedules import alpha_bars
from drp.sampling.solvers import (
    DDIM,
    DDPM,
    DPMSolver,
    EulerAncestral,
    Heun,
)
from tests.scheduler_runs import (
    BETAS,
    SHAPE,
    SPACINGS,
    STEPS,
    STEPS_OR_TYPES,
    TYPES,
    Theirs,
    bars_of,
    check,
    denoise,
    draw,
    ours,
    relative,
    with_bars,
    with_sigmas,
)


@pytest.mark.parametrize(("steps", "prediction"), STEPS_OR_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim(steps: int, spacing: str, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for eta, end in ((0.0, "zero"), (0.0, "sigma_min"), (0.6, "zero"), (1.0, "sigma_min")):
        scheduler = diffusers.DDIMScheduler(
            **BETAS,
            clip_sample=False,
            timestep_spacing=spacing,
            prediction_type=prediction,
            set_alpha_to_one=end == "zero",
            steps_offset=1,
        )
        scheduler.set_timesteps(steps)
        grid = make_grid(steps, family="ddim", spacing=spacing, offset=1, end=end)
        solver = DDIM(grid, TYPES[prediction], eta)
        theirs = Theirs(scheduler, step={"eta": eta})
        check(solver, theirs, monkeypatch, 2e-5)
        with_bars(scheduler)
        check(solver, theirs, monkeypatch, 1e-10)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddim_on_every_schedule(schedule: str, zero_snr: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    betas: dict[str, dict[str, Any]] = {
        "linear": {"beta_schedule": "linear"},
        "scaled_linear": BETAS,
        "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    }
    scheduler = diffusers.DDIMScheduler(
        **betas[schedule],
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_snr,
    )
    scheduler.set_timesteps(20)
    grid = make_grid(20, schedule=schedule, zero_snr=zero_snr)
    # Their float32 product of 1,000 factors is off by 1e-5 and more where alpha-bar is small.
    check(DDIM(grid, "v"), Theirs(scheduler), monkeypatch, 1e-4)
    np.testing.assert_allclose(alpha_bars(schedule, zero_snr), scheduler.alphas_cumprod.numpy(), atol=2e-6)
    again = make_grid(20, schedule=bars_of(scheduler))
    check(DDIM(again, "v"), Theirs(scheduler), monkeypatch, 1e-6)


@pytest.mark.parametrize(("steps", "prediction"), STEPS_OR_TYPES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm(steps: int, spacing: str, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variance in ("small", "large"):
        scheduler = diffusers.DDPMScheduler(
            **BETAS,
            clip_sample=False,
            timestep_spacing=spacing,
            prediction_type=prediction,
            variance_type=f"fixed_{variance}",
        )
        scheduler.set_timesteps(steps)
        solver = DDPM(make_grid(steps, family="ddpm", spacing=spacing), TYPES[prediction], variance)
        check(solver, Theirs(scheduler), monkeypatch)
        with_bars(scheduler)
        # Theirs never adds less noise than 1e-10 (`variance.clamp(min=1e-20)`), also where the step leads to no noise.
        least = 1e-10 * draw(steps - 1) if variance == "small" and scheduler.timesteps[-1] > 0 else 0.0
        error = relative(ours(solver) + least, Theirs(scheduler).run(monkeypatch))
        assert error <= 1e-12, error


@pytest.mark.parametrize(("steps", "prediction"), STEPS_OR_TYPES)
@pytest.mark.parametrize("sigmas", [None, "karras", "exponential", "beta"])
def test_euler(steps: int, sigmas: str | None, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for spacing in SPACINGS:
        named = {} if sigmas is None else {f"use_{sigmas}_sigmas": True}
        scheduler = diffusers.EulerDiscreteScheduler(
            **BETAS, **named, timestep_spacing=spacing, prediction_type=prediction
        )
        scheduler.set_timesteps(steps)
        grid = make_grid(steps, family="euler", spacing=spacing, sigmas=sigmas)
        check(DDIM(grid, TYPES[prediction]), Theirs(scheduler), monkeypatch)


def test_euler_ends_at_sigma_min_up_to_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, final_sigmas_type="sigma_min", timestep_spacing="trailing")
    scheduler.set_timesteps(12)
    grid = make_grid(12, family="euler", end="sigma_min")
    assert relative(ours(DDIM(grid)) / grid.alphas[-1], Theirs(scheduler).run(monkeypatch)) < 1e-5


@pytest.mark.parametrize(("steps", "prediction"), STEPS_OR_TYPES[:-1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_ancestral(steps: int, spacing: str, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing=spacing, prediction_type=prediction)
    scheduler.set_timesteps(steps)
    grid = make_grid(steps, family="euler", spacing=spacing)
    check(EulerAncestral(grid, TYPES[prediction]), Theirs(scheduler), monkeypatch)


@pytest.mark.parametrize(("steps", "prediction"), STEPS_OR_TYPES)
@pytest.mark.parametrize("sigmas", [None, "karras", "exponential", "beta"])
def test_heun(steps: int, sigmas: str | None, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for spacing in SPACINGS if prediction == "epsilon" else SPACINGS[:1]:
        named = {} if sigmas is None else {f"use_{sigmas}_sigmas": True}
        scheduler = diffusers.HeunDiscreteScheduler(
            **BETAS, **named, timestep_spacing=spacing, prediction_type=prediction
        )
        scheduler.set_timesteps(steps)
        grid = make_grid(steps, family="heun", spacing=spacing, sigmas=sigmas)
        with_sigmas(scheduler, grid)
        check(Heun(grid, TYPES[prediction]), Theirs(scheduler), monkeypatch, 1e-10)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_euler(steps: int, shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flow(diffusers.FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # its base is untyped
        init_noise_sigma = 1.0

        def scale_model_input(self, x: Tensor, t: Tensor) -> Tensor:
            return x

    for spacing, terminal in itertools.product((None, "karras", "exponential", "beta"), (None, 0.1)):
        named = {} if spacing is None else {f"use_{spacing}_sigmas": True}
        scheduler = Flow(shift=shift, shift_terminal=terminal, **named)
        scheduler.set_timesteps(steps)
        grid = flow_grid(steps, shift=shift, terminal=terminal, spacing=spacing)
        check(DDIM(grid, "flow"), Theirs(scheduler), monkeypatch)
    for kind in ("exponential", "linear"):
        scheduler = Flow(use_dynamic_shifting=True, time_shift_type=kind)
        sigmas = np.linspace(1, 1 / steps, steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, mu=dynamic_mu(1024))
        grid = flow_grid(steps, mu=dynamic_mu(1024), shape=kind, sigmas=sigmas)
        check(DDIM(grid, "flow"), Theirs(scheduler), monkeypatch)


def test_sigmas_and_timesteps_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    sigmas = [14.0, 6.0, 2.0, 0.7, 0.2]
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(sigmas=[*sigmas, 0.0])
    check(DDIM(make_grid(5, family="euler", spacing="linspace", sigmas=sigmas)), Theirs(scheduler), monkeypatch)
    timesteps = [999, 800, 500, 250, 30]
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS)
    scheduler.set_timesteps(timesteps=timesteps)
    check(DPMSolver(make_grid(5, family="dpm", timesteps=timesteps)), Theirs(scheduler), monkeypatch)


def test_image_to_image_starts_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, solver_order=2)
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(8)
    grid = make_grid(20, family="dpm", spacing="linspace")
    rest = grid.after(8)
    assert rest.steps == 12
    x = image = torch.linspace(-1, 1, math.prod(SHAPE), dtype=torch.float64).view(SHAPE)
    x = scheduler.add_noise(image, draw(-1), scheduler.timesteps[8:9])
    for t in scheduler.timesteps[8:]:
        x = scheduler.step(denoise(x, t.expand(2), {}), t, x).prev_sample
    start = rest.alphas[0] * image + rest.sigmas[0] * draw(-1)
    solver = DPMSolver(rest, lower_order_final=False)
    assert relative(run_reference(denoise, solver, Sequential(), start, {}).samples, x.double()) < 1e-5


@pytest.mark.parametrize("sigmas", ["exponential", "beta", "karras"])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_a_last_step_to_the_same_noise_level(sigmas: str, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named sigmas end at that of the first training timestep, and so does the grid: the state stays."""
    for steps in (10, 13, 28):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **BETAS, algorithm_type=algorithm, **{f"use_{sigmas}_sigmas": True}, final_sigmas_type="sigma_min"
        )
        scheduler.set_timesteps(steps)
        grid = {"sigmas": sigmas, "end": "sigma_min", "schedule": tuple(bars_of(scheduler))}
        solver = make_solver(algorithm, steps, grid=grid)
        assert solver.stands_still(steps - 1)
        assert solver.step(steps - 1) == {state(steps - 1): 1.0}
        scheduler.timesteps = torch.from_numpy(solver.grid.timesteps).long()
        check(solver, Theirs(scheduler), monkeypatch)


@pytest.mark.parametrize("name", ["deis", "unipc", "lms", "euler", "dpmsolver++", "dpmsolver", "sde-dpmsolver"])
@pytest.mark.parametrize("sigmas", ["exponential", "beta", "karras"])
def test_every_solver_takes_a_step_to_the_same_noise_level(name: str, sigmas: str) -> None:
    for options in ({}, {"order": 3}, {"variant": "bh1"}):
        if ("order" in options and name in ("euler", "lms", "sde-dpmsolver")) or (
            "variant" in options and name != "unipc"
        ):
            continue
        solver = make_solver(name, 13, grid={"sigmas": sigmas, "end": "sigma_min"}, options=options)
        assert ours(solver).isfinite().all()
