"""The registry of solvers by name, each with the grid that it belongs to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from drp.sampling.grids import Grid, flow_grid, ipndm_grid, make_grid
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


class _Named(NamedTuple):
    solver: Callable[..., Solver]
    family: str
    grid: Mapping[str, Any] = {}
    options: Mapping[str, Any] = {}


SOLVERS: Mapping[str, _Named] = {
    "ddim": _Named(DDIM, "ddpm"),
    "ddpm": _Named(DDPM, "ddpm"),
    "euler": _Named(DDIM, "euler"),
    "euler-ancestral": _Named(EulerAncestral, "euler"),
    "dpmsolver++": _Named(DPMSolver, "dpm"),
    "sde-dpmsolver++": _Named(DPMSolver, "dpm", {}, {"algorithm": "sde-dpmsolver++"}),
    "dpmsolver": _Named(DPMSolver, "dpm", {"end": "sigma_min"}, {"algorithm": "dpmsolver"}),
    "sde-dpmsolver": _Named(DPMSolver, "dpm", {"end": "sigma_min"}, {"algorithm": "sde-dpmsolver"}),
    "deis": _Named(DEIS, "dpm", {"end": "sigma_min"}),
    "unipc": _Named(UniPC, "dpm"),
    "lms": _Named(LinearMultistep, "euler"),
    "heun": _Named(Heun, "heun"),
    "pndm": _Named(PNDM, "pndm", {"spacing": "leading", "end": "sigma_min"}),
    "ipndm": _Named(IPNDM, "ipndm"),
}

SOLVER_NAMES = tuple(SOLVERS)


def make_solver(
    name: str,
    steps: int,
    prediction_type: str = "epsilon",
    grid: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    strength: float = 1.0,
) -> Solver:
    """Return the solver called `name` on a grid of `steps` steps; raise ValueError for invalid options.

    `grid` holds options of `make_grid`, or of `flow_grid` where `prediction_type` is "flow"; `options` those of the
    solver. `strength` below 1 starts in the middle: the last `int(strength * steps)` steps alone are taken.
    """
    given = (name, steps, prediction_type, _frozen(grid), _frozen(options), strength)
    try:
        return _make_solver(*given)  # The same one for the same arguments: its rows need not be worked out again.
    except TypeError:  # an option that has no hash, such as a list of sigmas
        return _make_solver.__wrapped__(*given)


def _frozen(options: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((options or {}).items()))


@functools.lru_cache(maxsize=32)
def _make_solver(
    name: str,
    steps: int,
    prediction_type: str,
    grid: tuple[tuple[str, Any], ...],
    options: tuple[tuple[str, Any], ...],
    strength: float,
) -> Solver:
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; choose one of {', '.join(SOLVERS)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; choose 1 or more")
    named = SOLVERS[name]
    full = _grid(name, named, steps, prediction_type, dict(grid))
    last = int(steps * strength) if 0 < strength <= 1 else 0  # nan and infinity are neither
    if last < 1:
        raise ValueError(f"strength is {strength}; of {steps} steps it must leave 1 or more: give {1 / steps:.3g} to 1")
    if last < steps and name in ("pndm", "ipndm"):
        raise ValueError(f"strength is {strength}, but {name} has its own first steps; choose another solver")
    part = full.after(full.steps - (2 * last - 1 if name == "heun" else last)) if last < steps else full
    given = {**named.options, **dict(options)}
    _check("solver_options", given, named.solver, ("grid", "prediction_type", "self"))
    return named.solver(part, prediction_type, **given)


def _grid(name: str, named: _Named, steps: int, prediction_type: str, given: Mapping[str, Any]) -> Grid:
    if named.family == "ipndm":
        _check("grid", given, ipndm_grid, ("steps",))
        return ipndm_grid(steps)
    if prediction_type == "flow":
        if name in ("ddpm", "pndm", "heun", "dpmsolver", "sde-dpmsolver", "deis", "lms", "euler-ancestral"):
            raise ValueError(
                f"solver is {name!r}, which is not defined on a flow-matching grid, where the first state has no "
                "signal; choose euler, dpmsolver++, sde-dpmsolver++ or unipc"
            )
        family = {"unipc": "unipc", "dpmsolver++": "dpm", "sde-dpmsolver++": "dpm"}.get(name, "euler")
        _check("grid", given, flow_grid, ("steps",))
        return flow_grid(steps, **{"family": family, **given})
    _check("grid", given, make_grid, ("steps",))
    return make_grid(steps, **{"family": named.family, **named.grid, **given})


def _check(what: str, given: Mapping[str, Any], function: Callable[..., Any], own: tuple[str, ...]) -> None:
    """Raise ValueError for options that a function does not have; the message lists those that it has."""
    known = [name for name in inspect.signature(function).parameters if name not in own]
    for name in given:
        if name not in known:
            raise ValueError(f"{what} holds {name!r}; known here: {', '.join(known) or 'none'}")
