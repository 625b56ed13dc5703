"""Whole runs of a scheduler of diffusers and of a solver, on the same noise."""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_euler_ancestral_discrete
from diffusers.schedulers import scheduling_dpmsolver_multistep as scheduling_dpm
from torch import Tensor

from drp.sampling.grids import Grid
from drp.sampling.modes import Sequential
from drp.sampling.reference import run_reference
from drp.sampling.schedules import Float64s, alpha_bars
from drp.sampling.solvers import Solver

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
