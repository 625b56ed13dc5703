"""Reference: any mode in one process, one evaluation at a time. What the workers compute must equal it bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from drp.sampling.modes import Mode
from drp.sampling.result import Result
from drp.sampling.run import Callback, Noise, Run, slots
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
) -> Result:
    """Sample from `start` [B, ...] in this process and thread; the result's mode and devices are descriptions.

    `fresh` draws noise for solvers that add some; `watch` asks for residuals in every mode.
    """
    drafts, predictions = (start.new_empty((slots(solver, mode), start.numel())) for _ in range(2))
    run = Run(solver, mode, start, drafts, predictions, fresh, watch)
    evaluations, device_seconds = 0, 0.0
    began = time.perf_counter()
    with torch.inference_mode():
        for tasks in run.rounds():
            run.refine(callback)
            for task in tasks:
                started = time.perf_counter()
                t = torch.full((len(start),), task.timestep, dtype=torch.float32)
                predictions[task.slot] = denoiser(drafts[task.slot].view(start.shape), t, cond).reshape(-1)
                device_seconds += time.perf_counter() - started
                evaluations += 1
        run.refine(callback)
    return Result(
        samples=run.state.clone(),
        mode=type(mode).__name__.lower(),
        drafts=mode.width,
        steps=solver.grid.steps,
        devices=("this process",),
        rounds=run.rounds_done,
        evaluations=evaluations,
        seconds=time.perf_counter() - began,
        device_seconds=device_seconds,
        residuals=run.residuals,
        cuts=tuple(run.cuts),
    )
