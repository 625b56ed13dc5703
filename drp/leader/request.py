"""The options of one sampling run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from drp.sampling.drafts import DraftRule
from drp.sampling.mode_selection import DEFAULT_TOLERANCE
from drp.sampling.modes import Mode
from drp.sampling.options import RunOptions, check_names
from drp.sampling.run import Callback
from drp.sampling.solvers import Solver


class RequestArguments(RunOptions, total=False):
    """The keyword arguments of `sample` and `reference` that describe a run; see `Request`."""

    labels: Sequence[int] | Tensor | None
    cond: Mapping[str, Tensor]
    solver: str | Solver
    noise: Tensor | None
    image: Tensor | None
    mode: str | Mode
    callback: Callback | None
    out: Tensor | None


def make_request(options: RequestArguments) -> Request:
    """Return the request with these options; raise TypeError for an unknown name."""
    check_names(options, [each.name for each in fields(Request)])
    return Request(**options)


@dataclass(frozen=True)
class Request:
    """The options of one run.

    labels: class labels, one per sample, for a model with classes.
    count: the number of samples B, at most 16,384; by default the number of labels, else 1.
    shape: the shape of one sample, without the batch, for a model that does not define it.
    cond: tensors by name that are passed to the denoiser unchanged.
    guidance: the scale of classifier-free guidance; by default the model's.
    steps: N, the number of solver steps, at most 10,000.
    solver: the solver's name (`drp.sampling.registry.SOLVER_NAMES`), or a Solver, which already defines its grid, its
        prediction type and its steps. See docs/schedulers.md.
    solver_options: options of the solver by name, such as {"order": 3} or {"eta": 1.0}.
    grid: options of `drp.sampling.grids.make_grid`, or of `flow_grid` for prediction type "flow", by name, such as
        {"spacing": "leading", "sigmas": "karras"} or {"shift": 3.0}.
    prediction_type: what the model predicts: "epsilon", "v", "sample" or "flow".
    noise: standard normal numbers [B, ...] float32 to start from, instead of noise drawn from the seed. The tensor is
        not copied and is read in every round, so it must not change until the run is over.
    image: samples [B, ...] to start from at an intermediate step, noised according to `strength`.
    strength: the share of the steps that is taken, greater than 0 and at most 1.
    mode: "window", "aggressive", "conservative", "adaptive", "rolling", "sequential", or a mode object. See
        docs/drafts.md.
    drafts: n, the number of drafts per round, at most 256; by default one per device. The samples depend on this number
        but not on the devices.
    target_speedup: choose a window with at most `drafts` drafts so that steps divided by rounds reach this number.
    target_rounds: choose a window with at most `drafts` drafts that takes this number of rounds. For the fewest rounds
        its last drafts may lie two apart.
    stride: for mode "window", the number of steps by which the window advances per round, 1 to n; by default n / 2 + 1,
        or (n + 1) / 2 from 3 drafts on if the solver adds noise.
    offsets: for mode "window", how many steps ahead each of the n drafts lies, in ascending order; or "dense" (1 to n),
        "even" (2 to 2n) or "tapered" (dense, then even). If the offsets have gaps, the stride is n by default.
    rule: the draft rule, "paper", "secant", "damped" or a `drp.sampling.drafts.DraftRule`; the default is the rule that
        measured best.
    tolerance: for mode "adaptive", the relative residual above which predictions are discarded; 0 means sequential
        sampling.
    warmup: the number of steps taken sequentially at the start.
    sweeps: how many additional times each block of drafts is evaluated; each sweep refines through the previous one's
        predictions. A run has at most 100,000 evaluations.
    seed: the seed of the noise. Sample i has the same noise for every count.
    callback: called as callback(k, state) once for each step k = 1..N, in order. The state [B, ...] is a copy, which
        the callback may keep or write to. It runs while the workers compute. An exception ends the run.
    residuals: report the residual of every draft in the result, even in modes that do not need residuals.
    out: a tensor [B, ...] float32 to which the samples are written; `result.samples` is then this tensor.
    """

    labels: Sequence[int] | Tensor | None = None
    count: int | None = None
    shape: Sequence[int] | None = None
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    guidance: float | None = None
    steps: int = 48
    solver: str | Solver = "ddim"
    solver_options: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Any] = field(default_factory=dict)
    prediction_type: str = "epsilon"
    noise: Tensor | None = None
    image: Tensor | None = None
    strength: float = 1.0
    mode: str | Mode = "window"
    drafts: int | None = None
    target_speedup: float | None = None
    target_rounds: int | None = None
    stride: float | None = None
    offsets: str | Sequence[int] | None = None
    rule: str | DraftRule | None = None
    tolerance: float = DEFAULT_TOLERANCE
    warmup: int = 0
    sweeps: int = 0
    seed: int = 0
    callback: Callback | None = None
    residuals: bool = False
    out: Tensor | None = None
