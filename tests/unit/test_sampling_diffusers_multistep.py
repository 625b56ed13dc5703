"""Every multistep solver, sequential, against its diffusers scheduler over whole runs."""

import itertools

import diffusers
import numpy as np
import pytest
import torch

from drp.sampling.grids import flow_grid, ipndm_grid, make_grid
from drp.sampling.solvers import (
    DEIS,
    IPNDM,
    PNDM,
    DPMSolver,
    LinearMultistep,
    UniPC,
)
from tests.scheduler_runs import (
    BETAS,
    SPACINGS,
    STEPS,
    STEPS_AND_ORDERS,
    STEPS_OR_TYPES,
    TURNS,
    TYPES,
    Theirs,
    bars_of,
    check,
    with_bars,
    with_sigmas,
)


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
