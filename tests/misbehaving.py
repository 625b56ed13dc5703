"""A denoiser that misbehaves once, in one process, where a test has a worker answer ahead of its device.

The environment variable DRP_TEST_ORDERS names a file, which says what is to happen and names another file: whoever
makes that one, does it. Tests that share workers write their orders there one after the other.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drp.protocol import timeline
from drp.workers import async_executor

AT = 450
"""The timestep below which it happens: of 20 steps it is the first of two drafts of a round."""


def plain(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Any shape: enough arithmetic that other inputs would show."""
    return torch.sin(3 * x) * (0.3 + t / 2000).view(-1, *[1] * (x.dim() - 1))


def make_plain() -> Callable[..., Tensor]:
    return plain


def told() -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(Path(os.environ["DRP_TEST_ORDERS"]).read_text())
    except FileNotFoundError:
        return {}
    return found


def first() -> bool:
    """Whether nobody has done it yet; the asking does."""
    path = Path(told()["path"])
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Evaluated(threading.local):
    """What this thread has evaluated last."""

    timestep = 1000.0


evaluated = Evaluated()


def predict(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Do as `plain` does, but for what is told."""
    orders, evaluated.timestep = told(), float(t[0])
    what, at = orders.get("what"), str(evaluated.timestep)
    if what == "gates":
        (Path(orders["path"]) / f"at {at}").touch()
        while at in orders["closed"] and not (Path(orders["path"]) / f"open {at}").exists():
            time.sleep(0.01)
    if what == "wait":
        while not Path(orders["path"]).exists():
            time.sleep(0.01)
    if what == "slow":
        time.sleep(0.02)
    due = what in ("kill", "hang", "nan", "raise", "assert", "memory") and evaluated.timestep < AT and first()
    if due and what == "kill":
        time.sleep(0.1)  # until the answer is on its way
        os.kill(os.getpid(), signal.SIGKILL)
    if due and what == "hang":
        time.sleep(600)
    if due and what == "raise":
        raise ArithmeticError("the denoiser has had enough")
    if due and what == "assert":
        raise RuntimeError("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`")
    if due and what == "memory":
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    made = plain(x, t, cond)
    return made * torch.nan if due and what == "nan" else made


def make() -> Callable[..., Tensor]:
    """Return it, this process prepared: two of the faults lie between lines of the worker."""
    async_executor.write_completion_now = stale_stamp  # type: ignore[attr-defined]  # the worker's own name for it, in its own process
    async_executor.HostExecutor.submit = early_put  # type: ignore[method-assign]  # the worker's own code, in its own process
    return predict


def stale_stamp(places: memoryview, row: int, sequence: int, *rest: int, **status: int) -> None:
    """Write the completion record of an earlier draft, or one without times as a GPU does, if that is told."""
    if told().get("what") == "untimed":
        rest = ()
    sequence -= 1 if told().get("what") == "stale" and evaluated.timestep < AT and first() else 0
    timeline.write_completion_now(places, row, sequence, *rest, **status)


_put = async_executor.HostExecutor.submit


def early_put(self: async_executor.HostExecutor, work: async_executor.WorkItem) -> float:
    """Record before the evaluation, if that is told, so that whoever waits for it does not wait for that.

    Or report an earlier evaluation's time, as a worker on a GPU does, except for the first drafts.
    """
    if told().get("what") == "untimed":
        _put(self, work)
        return 0.25 if work.draft.timestep < AT else 0.0
    if told().get("what") != "early" or work.draft.timestep >= AT or not first():
        return _put(self, work)
    bound = self._runs[work.draft.run]
    bound.leader_event.wait(work.draft.after)
    bound.worker_event.record()
    self._stream.enqueue(lambda: time.sleep(2))  # longer than it takes any leader to look, and to end this
    self._stream.enqueue(lambda: self._run(bound, work, 0))
    return 0.0
