"""Asynchronous execution on a GPU: drafts are queued on CUDA streams.

The compute stream reads and writes runs on a GPU directly. For runs on the host there are copy streams as well, which
copy the next draft in and the last prediction out while the GPU computes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import torch
from torch import Tensor

from drp.models.registry import Denoiser
from drp.protocol.arena import Arena
from drp.protocol.cuda import ArenaEvent, GpuCounters, WorkerCounter
from drp.protocol.handles import Handle
from drp.protocol.messages import Draft
from drp.protocol.timeline import (
    COMPLETED,
    RECHECK_INTERVAL,
    LeaderEvent,
    OwnEvent,
    TimelineSemaphore,
    write_completion,
)
from drp.workers.async_executor import RunBinding, WorkItem, host_timelines
from drp.workers.cuda_device import CudaDevice

Evaluations = deque[tuple[Any, Any]]
"""CUDA events before and after each evaluation, oldest first."""


class CudaExecutor:
    """The streams of one GPU. The compute stream is the current one of the constructing thread."""

    def __init__(self, device: CudaDevice, denoiser: Denoiser) -> None:
        self._device, self._denoiser, self.device = device, denoiser, device.device
        self._compute = torch.cuda.current_stream(device.device)
        self._in, self._out = (torch.cuda.Stream(device.device) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types for it
        self._last: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
        self._counters: dict[Handle, WorkerCounter] = {}
        self._runs: dict[int, RunBinding] = {}
        self._evaluations: defaultdict[int, Evaluations] = defaultdict(deque)
        """By run, the evaluations whose times were not returned yet."""

    @property
    def busy(self) -> bool:
        """Whether queued work is unfinished; raises the error of a kernel."""
        return not self._last.query()

    def bind(self, run: int, arena: Arena) -> None:
        """Open the events and completion records of a run; the worker's counter is opened once, for all runs."""
        order = arena.bind.async_config
        assert order is not None
        leaders: LeaderEvent
        own: OwnEvent
        if order.counters is None:
            lines, workers = host_timelines(arena)
            leaders, own = (PinnedEvent(each, self) for each in (lines, workers[order.index]))
        else:
            if order.counters not in self._counters:
                self._counters[order.counters] = WorkerCounter(GpuCounters.open(order.counters), order.index)
            leaders, own = ArenaEvent(arena.memory), self._counters[order.counters]
        self._runs[run] = RunBinding(arena, leaders, own)

    def unbind(self, run: int) -> RunBinding | None:
        self._evaluations.pop(run, None)
        return self._runs.pop(run, None)

    def rebind(self, run: int, bound: RunBinding) -> None:
        raise NotImplementedError(f"run {run} on a GPU is bound again")

    @torch.inference_mode()
    def submit(self, work: WorkItem) -> float:
        bound, separate = self._runs[work.draft.run], work.arena.memory.device.type == "cpu"
        into, out = (self._in, self._out) if separate else (self._compute, self._compute)
        with torch.cuda.stream(into):
            bound.leader_event.wait(work.draft.after)
            here = self._device.copy_in(work.inputs)
        self._compute.wait_stream(into)
        made = [{k: torch.empty_like(v, device=self.device) for k, v in each.items()} for each in work.outputs]
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types for it
        began.record(self._compute)
        self._denoiser.evaluate_batch(here, work.timesteps, work.arena.cond, made)
        ended.record(self._compute)
        out.wait_stream(self._compute)
        with torch.cuda.stream(out):
            self._device.copy_out(made, work.outputs)
            for row, mine in zip(work.rows, made, strict=True):
                write_completion(bound.completions[row], work.draft.sequence, mine.values())
            bound.worker_event.record()
            self._last.record(out)
        if separate:  # Each was allocated for one stream and is used by another, and is freed only after that.
            for used, stream in ((here, self._compute), (made, out)):
                for tensor in (tensor for each in used for tensor in each.values()):
                    tensor.record_stream(stream)
        evaluations = self._evaluations[work.draft.run]
        evaluations.append((began, ended))
        return last_seconds(evaluations)

    def take_failures(self) -> list[tuple[Draft, BaseException]]:
        return []

    def synchronize(self) -> None:
        self._last.synchronize()

    def close(self) -> None:
        """Do nothing, since the process ends."""


def last_seconds(evaluations: Evaluations) -> float:
    """Remove the evaluations that are complete; return the seconds of the last of them, 0 if there is none.

    It does not wait: an evaluation whose events are not complete stays.
    """
    seconds = 0.0
    while evaluations and evaluations[0][1].query():
        began, ended = evaluations.popleft()
        seconds = began.elapsed_time(ended) / 1e3
    return seconds


class PinnedEvent:
    """A semaphore in pinned host memory, for a run whose arena is on the host: the leader's, or the worker's own.

    The GPU cannot wait for the leader's cores, so the worker's thread does, before it queues; the GPU counts itself.
    """

    def __init__(self, counters: Tensor, executor: CudaExecutor) -> None:
        self._numbers, self._semaphore, self._executor = counters, TimelineSemaphore(counters), executor

    def record(self) -> int:
        count = self._semaphore.next_value()
        there = torch.full((1,), count, dtype=torch.int64, device=self._executor.device)
        self._numbers[COMPLETED : COMPLETED + 1].copy_(there, non_blocking=True)
        return count

    def wait(self, number: int) -> None:
        """Wait until the leader's event completes; the leader ends a worker that takes too long.

        The leader may be waiting for this GPU, so an error of a kernel is raised here.
        """
        while self._semaphore.completed_at(number) is None:
            self._semaphore.wait(number, RECHECK_INTERVAL)
            _ = self._executor.busy
