"""The reference: any mode in one process. What workers compute must equal it bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from drp.sampling.modes import Mode
from drp.sampling.result import Result
from drp.sampling.run import Callback, Noise, Run, Task, batches
from drp.sampling.slot_allocator import slots
from drp.sampling.solvers import Solver

Denoiser = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(x [B, ...], t float32 [B], cond) -> prediction, like x."""


def run_reference(
    denoiser: Denoiser,
    solver: Solver,
    mode: Mode,
    start: Tensor,
    cond: Mapping[str, Tensor],
    callback: Callback | None = None,
    fresh: Noise | None = None,
    watch: bool = False,
    batch: int = 1,
) -> Result:
    """Sample in this process and thread.

    Args:
        denoiser: called with copies of its arguments, to which it may write.
        solver: the solver.
        mode: the mode.
        start: the state at index 0, [B, ...].
        cond: the conditions.
        callback: as of `drp.leader.request.Request`.
        fresh: draws noise, for solvers that add it.
        watch: report residuals in every mode.
        batch: the number of drafts that are evaluated together; conditions with an item per sample are repeated.
    """
    drafts, predictions = (start.new_empty((slots(solver, mode), start.numel())) for _ in range(2))
    run = Run(solver, mode, start, drafts, predictions, fresh, watch)
    evaluations, device_seconds = 0, 0.0
    own = None if callback is None else _with_copies(callback)
    began = time.perf_counter()
    with torch.inference_mode():
        for tasks in run.rounds():
            run.refine(own)
            for some in batches(tasks, batch):
                started = time.perf_counter()
                made = _evaluate(denoiser, [drafts[task.slot].view(start.shape) for task in some], some, cond)
                for task, predicted in zip(some, made, strict=True):
                    predictions[task.slot] = predicted.reshape(-1)
                device_seconds += time.perf_counter() - started
                evaluations += len(some)
        run.refine(own)
    return Result(
        samples=run.state.clone(),
        mode=mode.name,
        drafts=mode.width,
        steps=solver.grid.steps,
        devices=("this process",),
        rounds=run.rounds_done,
        evaluations=evaluations,
        seconds=time.perf_counter() - began,
        device_seconds=device_seconds,
        residuals=run.residuals,
        cuts=tuple(run.cuts),
        evaluated=tuple(run.evaluated),
    )


def _evaluate(
    denoiser: Denoiser, drafts: Sequence[Tensor], tasks: Sequence[Task], cond: Mapping[str, Tensor]
) -> Sequence[Tensor]:
    """Return the predictions at drafts, which are evaluated as one batch if there are several."""
    samples = len(drafts[0])
    ts = [torch.full((samples,), task.timestep, dtype=torch.float32, device=drafts[0].device) for task in tasks]
    if len(tasks) == 1:
        return [denoiser(drafts[0].clone(), ts[0], {name: value.clone() for name, value in cond.items()})]
    repeated = {name: repeat(value, samples, len(tasks)) for name, value in cond.items()}
    return denoiser(torch.cat(list(drafts)), torch.cat(ts), repeated).chunk(len(tasks))


def _with_copies(callback: Callback) -> Callback:
    """Return the callback, called with a copy of the state."""
    return lambda k, state: callback(k, state.clone())


def repeat(value: Tensor, samples: int, times: int) -> Tensor:
    """Return a condition for `times` batches of `samples` in one: repeated if it has an item for each, else copied."""
    return torch.cat([value] * times) if value.dim() and len(value) == samples else value.clone()
