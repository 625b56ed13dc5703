"""Every solver, sequential, against its diffusers scheduler over whole runs."""

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_euler_ancestral_discrete
from diffusers.schedulers import scheduling_dpmsolver_multistep as scheduling_dpm
from torch import Tensor

from drp.sampling.grids import Grid, dynamic_mu, flow_grid, ipndm_grid, make_grid
from drp.sampling.linear import state
from drp.sampling.modes import Sequential
from drp.sampling.reference import run_reference
from drp.sampling.registry import make_solver
from drp.sampling.schedules import Float64s, alpha_bars
from drp.sampling.solvers import (
    DDIM,
    DDPM,
    DEIS,
    IPNDM,
    PNDM,
    DPMSolver,
    EulerAncestral,
    Heun,
    LinearMultistep,
    Solver,
    UniPC,
)

# diffusers' tables call __array__ as NumPy 1 did, of which NumPy 2 warns.
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

SHAPE = (2, 3, 4, 4)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TYPES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}
TURNS = ("epsilon", "v_prediction", "sample", "epsilon")  # as many as go round with three spacings, not in step
SPACINGS = ("leading", "linspace", "trailing")
STEPS = (10, 28)  # One divides the 1,000 training timesteps, the other does not.
# What the network predicts is turned into a slope step by step, whatever their number is.
STEPS_OR_TYPES = [*((steps, "epsilon") for steps in STEPS), (10, "v_prediction"), (10, "sample")]
# A run of order 3 begins with steps of orders 1 and 2; in 28 steps it does not end with them, as it does in 10.
STEPS_AND_ORDERS = [(10, 1), (10, 2), (10, 3), (28, 3)]


def denoise(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Nonlinear in x, and different at every timestep."""
    level = t.float().double().div(1000)[:, None, None, None].to(x.dtype)
    return torch.tanh(0.7 * x + level) * (0.6 + 0.3 * level) + 0.1 * x.roll(1, dims=-1)


@functools.cache
def draw(k: int) -> Tensor:
    """The noise of step k; k = -1 is the start."""
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1000 + k))


@dataclass
class Theirs:
    """A diffusers scheduler, made ready for a run."""

    scheduler: Any
    step: dict[str, Any] = field(default_factory=dict)

    def run(self, monkeypatch: pytest.MonkeyPatch) -> Tensor:
        scheduler, numbers = self.scheduler, itertools.count()
        for module in (scheduling_ddim, scheduling_ddpm, scheduling_dpm, scheduling_euler_ancestral_discrete):
            monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: draw(next(numbers)))
        x = draw(-1) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t)
            output = denoise(seen, t.expand(len(x)), {})
            x = scheduler.step(output, t, x, **self.step).prev_sample
        samples: Tensor = x.double()
        return samples


def ours(solver: Solver) -> Tensor:
    return run_reference(denoise, solver, Sequential(), draw(-1) * solver.grid.start, {}, fresh=draw).samples


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def check(solver: Solver, theirs: Theirs, monkeypatch: pytest.MonkeyPatch, tolerance: float = 1e-5) -> None:
    # Timesteps looked up by noise level inherit the rounding of their float32 tables.
    np.testing.assert_allclose(solver.grid.timesteps, theirs.scheduler.timesteps.double().numpy(), atol=5e-3)
    error = relative(ours(solver), theirs.run(monkeypatch))
    assert error <= tolerance, error


BARS = torch.from_numpy(alpha_bars("scaled_linear"))


def bars_of(scheduler: Any) -> Float64s:
    """Return the scheduler's own alpha-bar: a float32 product of 1,000 factors."""
    bars: Float64s = scheduler.alphas_cumprod.double().numpy()
    return bars


def with_bars(scheduler: Any) -> Any:
    """Replace alpha-bar by ours, float64."""
    scheduler.alphas_cumprod = BARS.clone()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = BARS[0] if scheduler.final_alpha_cumprod < 1 else torch.tensor(1.0).double()
    return scheduler


def with_sigmas(scheduler: Any, grid: Grid) -> Any:
    """Replace sigmas by ours, float64, and check that they were the same to float32."""
    sigmas = torch.from_numpy(grid.sigmas / grid.alphas)
    torch.testing.assert_close(scheduler.sigmas.double(), sigmas, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scheduler.timesteps.double(), torch.from_numpy(grid.timesteps), rtol=0, atol=5e-3)
    scheduler.sigmas, scheduler.timesteps = sigmas, torch.from_numpy(grid.timesteps)
    return scheduler


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


@pytest.mark.parametrize(("steps", "order"), [*STEPS_AND_ORDERS, (28, 2)])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"])
@pytest.mark.filterwarnings("ignore:.*algorithm_type.*deprecated:FutureWarning")
def test_dpm_solver(steps: int, order: int, algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if algorithm.startswith("sde") and order == 3:
        with pytest.raises(ValueError, match="choose 1 or 2"):
            DPMSolver(make_grid(steps, family="dpm"), order=3, algorithm=algorithm)
        return
    ends = ("zero", "sigma_min") if algorithm.endswith("++") else ("sigma_min",)
    choices = itertools.product(SPACINGS, ends)
    # Each variant with each end.
    variants = itertools.cycle(("midpoint", "heun") if len(ends) == 1 else ("midpoint", "heun", "heun", "midpoint"))
    for (spacing, end), variant, prediction in zip(choices, variants, itertools.cycle(TURNS)):
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **BETAS,
            solver_order=order,
            algorithm_type=algorithm,
            solver_type=variant,
            timestep_spacing=spacing,
            prediction_type=prediction,
            final_sigmas_type=end,
        )
        scheduler.set_timesteps(steps)
        grid = make_grid(steps, family="dpm", spacing=spacing, end=end, schedule=bars_of(scheduler))
        solver = DPMSolver(grid, TYPES[prediction], order, algorithm, variant)
        check(solver, Theirs(scheduler), monkeypatch)


@pytest.mark.parametrize("sigmas", ["karras", "exponential", "beta"])
def test_dpm_solver_in_sigmas(sigmas: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps, schedule in itertools.product((10, 25), ("scaled_linear", "cosine")):
        betas = BETAS if schedule == "scaled_linear" else {"beta_schedule": "squaredcos_cap_v2"}
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **betas, **{f"use_{sigmas}_sigmas": True}, lower_order_final=False
        )
        scheduler.set_timesteps(steps)
        bars = bars_of(scheduler)
        grid = make_grid(steps, family="dpm", sigmas=sigmas, schedule=bars if schedule == "scaled_linear" else schedule)
        # In float32, theirs may cut 998.9999 off to 998.
        np.testing.assert_allclose(grid.timesteps, scheduler.timesteps.numpy(), atol=1)
        assert np.sum(grid.timesteps != scheduler.timesteps.numpy()) <= 2
        scheduler.timesteps = torch.from_numpy(grid.timesteps).long()
        check(DPMSolver(grid, lower_order_final=False), Theirs(scheduler), monkeypatch)


@pytest.mark.parametrize(("steps", "prediction"), STEPS_OR_TYPES)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(steps: int, order: int, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for spacing in SPACINGS if (steps, prediction) == (10, "epsilon") else SPACINGS[:1]:
        scheduler = diffusers.DEISMultistepScheduler(
            **BETAS, solver_order=order, timestep_spacing=spacing, prediction_type=prediction
        )
        scheduler.set_timesteps(steps)
        grid = make_grid(steps, family="dpm", spacing=spacing, end="sigma_min")
        solver = DEIS(grid, TYPES[prediction], order)
        # Its coefficients are float32, and so are its tables: a product of 1,000 factors, which processors round
        # differently. 1.02e-5 was seen.
        check(solver, Theirs(scheduler), monkeypatch, 5e-4 if order == 3 else 2e-5)
        scheduler.set_timesteps(steps)
        with_sigmas(scheduler, grid)
        check(solver, Theirs(scheduler), monkeypatch, 1e-10)


@pytest.mark.parametrize(("steps", "order"), STEPS_AND_ORDERS)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc(steps: int, order: int, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On grids that all schedulers of this family have: each spacing with each kind, not with each of the rest."""
    kinds = [("data", "zero"), ("data", "sigma_min"), ("epsilon", "sigma_min")]
    choices = itertools.product((True, False), kinds)
    spacings = (*SPACINGS, *SPACINGS[1:], SPACINGS[0])
    for (corrector, (of, end)), spacing, prediction in zip(choices, spacings, itertools.cycle(TURNS)):
        if (variant, end) == ("bh1", "zero"):  # theirs ends in 0 times infinity
            continue
        scheduler = diffusers.UniPCMultistepScheduler(
            **BETAS,
            solver_order=order,
            solver_type=variant,
            predict_x0=of == "data",
            timestep_spacing=spacing,
            prediction_type=prediction,
            final_sigmas_type=end,
            disable_corrector=[] if corrector else list(range(steps)),
        )
        scheduler.set_timesteps(steps)
        grid = make_grid(steps, family="dpm", spacing=spacing, end=end)
        solver = UniPC(grid, TYPES[prediction], order, variant, of, corrector)
        with_sigmas(scheduler, grid)
        check(solver, Theirs(scheduler), monkeypatch, 1e-10)


@pytest.mark.parametrize(("steps", "prediction"), STEPS_OR_TYPES)
@pytest.mark.parametrize("sigmas", [None, "karras", "exponential", "beta"])
def test_linear_multistep(steps: int, sigmas: str | None, prediction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On grids that are Euler's: each spacing, but with orders in turn."""
    every = (steps, prediction) == (10, "epsilon")
    for spacing, order in zip(SPACINGS, (1, 2, 4), strict=True) if every else ((SPACINGS[STEPS.index(steps)], 4),):
        named = {} if sigmas is None else {f"use_{sigmas}_sigmas": True}
        scheduler = diffusers.LMSDiscreteScheduler(
            **BETAS, **named, timestep_spacing=spacing, prediction_type=prediction
        )
        scheduler.set_timesteps(steps)
        grid = make_grid(steps, family="euler", spacing=spacing, sigmas=sigmas)
        with_sigmas(scheduler, grid)
        solver = LinearMultistep(grid, TYPES[prediction], order)
        check(solver, Theirs(scheduler, step={"order": order}), monkeypatch, 1e-10)


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


@pytest.mark.parametrize("steps", [1, 2, 3, *STEPS])
def test_pndm(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for end in ("zero", "sigma_min"):
        scheduler = diffusers.PNDMScheduler(
            **BETAS, skip_prk_steps=True, set_alpha_to_one=end == "zero", steps_offset=1
        )
        scheduler.set_timesteps(steps)
        grid = make_grid(steps, family="pndm", spacing="leading", offset=1, end=end)
        check(PNDM(grid), Theirs(scheduler), monkeypatch)
        scheduler.set_timesteps(steps)
        with_bars(scheduler)
        check(PNDM(grid), Theirs(scheduler), monkeypatch, 1e-10)


@pytest.mark.parametrize("steps", [2, *STEPS])
def test_ipndm(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(steps)
    grid = ipndm_grid(steps)
    check(IPNDM(grid, "v"), Theirs(scheduler), monkeypatch)
    scheduler.set_timesteps(steps)
    scheduler.betas, scheduler.alphas = torch.from_numpy(grid.sigmas), torch.from_numpy(grid.alphas)
    check(IPNDM(grid, "v"), Theirs(scheduler), monkeypatch, 1e-10)


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


@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep_on_flow_matching(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for steps, shift in itertools.product((10, 25), (1.0, 3.0)):
        flow = {"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"}
        dpm = diffusers.DPMSolverMultistepScheduler(solver_order=order, **flow)
        dpm.set_timesteps(steps)
        check(DPMSolver(flow_grid(steps, family="dpm", shift=shift), "flow", order), Theirs(dpm), monkeypatch)
        unipc = diffusers.UniPCMultistepScheduler(solver_order=order, **flow)
        unipc.set_timesteps(steps)
        check(UniPC(flow_grid(steps, family="unipc", shift=shift), "flow", order), Theirs(unipc), monkeypatch)


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
