"""Seat ahead: what `drp.workers.ahead` is on a GPU: a draft is answered once its evaluation is queued on streams.

Not yet run on a GPU. A run on a GPU is read and written by the compute stream itself. For one on the host there are
copy streams beside it: the next draft comes in, and the last prediction goes out, while the GPU computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drp.models.registry import Denoiser
from drp.protocol.arena import Arena
from drp.protocol.cuda import EventRecord, GpuEvent, RunRecord
from drp.protocol.messages import Draft
from drp.protocol.order import PATIENCE, REACHED, LeadersRecord, Line, OwnRecord, stamp
from drp.workers.ahead import Bound, Work, host_lines
from drp.workers.seat import Seat


class GpuAhead:
    """The streams of one GPU. The compute stream is the seat's, the current one of the thread that makes this."""

    def __init__(self, seat: Seat, denoiser: Denoiser) -> None:
        self._seat, self._denoiser, self._device = seat, denoiser, seat.device
        self._compute = torch.cuda.current_stream(seat.device)
        self._in, self._out = (torch.cuda.Stream(seat.device) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types for it
        self._last: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
        self._events: dict[bytes, GpuEvent] = {}
        self._runs: dict[int, Bound] = {}

    @property
    def busy(self) -> bool:
        """Whether the GPU has not come to the end of what was queued; raises what a kernel did wrong."""
        return not self._last.query()

    def bind(self, run: int, arena: Arena) -> None:
        """Take up a run's records and stamps; the worker's event is opened once, and comes again with later runs."""
        assert arena.bind.order is not None
        event = arena.bind.order.event
        leaders: LeadersRecord
        own: OwnRecord
        if event is None:
            leaders, own = (PinnedRecord(line, self._device) for line in host_lines(arena))
        else:
            if event not in self._events:
                self._events[event] = GpuEvent.open(event)
            leaders, own = RunRecord(arena.memory), EventRecord(self._events[event])
        self._runs[run] = Bound(arena, leaders, own)

    def unbind(self, run: int) -> None:
        """Let go of them."""
        self._runs.pop(run, None)

    def put(self, work: Work) -> None:
        """Queue the copies in, the evaluation, the copies out and the stamps."""
        bound, apart = self._runs[work.draft.run], work.arena.memory.device.type == "cpu"
        into, out = (self._in, self._out) if apart else (self._compute, self._compute)
        with torch.cuda.stream(into):
            bound.leaders.wait(work.draft.after)
            here = self._seat.bring(work.inputs)
        self._compute.wait_stream(into)
        made = [{k: torch.empty_like(v, device=self._device) for k, v in each.items()} for each in work.outputs]
        self._denoiser.evaluate_batch(here, work.timesteps, work.arena.cond, made)
        out.wait_stream(self._compute)
        with torch.cuda.stream(out):
            self._seat.hand_over(made, work.outputs)
            for row, mine in zip(work.rows, made, strict=True):
                stamp(bound.stamps[row], work.draft.sequence, mine.values())
            bound.own.record()
            self._last.record(out)
        if apart:  # Each was allocated for one stream and is used by another: not to be used again before that is done.
            for used, stream in ((here, self._compute), (made, out)):
                for tensor in (tensor for each in used for tensor in each.values()):
                    tensor.record_stream(stream)

    def failed(self) -> list[tuple[Draft, Exception]]:
        """Return nothing: what is raised on a GPU after the answer ends the worker."""
        return []

    def settle(self) -> None:
        """Wait for the GPU."""
        self._last.synchronize()

    def close(self) -> None:
        """Do nothing: the process ends."""


class PinnedRecord:
    """Numbers that lie on the host, pinned, beside a run that the leader's cores compute: the leader's, or its own.

    The GPU cannot wait for the leader's cores, so the worker's thread does, before it queues; the GPU counts itself.
    """

    def __init__(self, line: Tensor, device: torch.device) -> None:
        self._numbers, self._line, self._device = line, Line(line), device

    def record(self) -> int:
        """Count, and have the current stream say when it is there."""
        count = self._line.count()
        there = torch.full((1,), count, dtype=torch.int64, device=self._device)
        self._numbers[REACHED : REACHED + 1].copy_(there, non_blocking=True)
        return count

    def wait(self, number: int) -> None:
        """Wait until the leader has come so far; it ends a worker for which that takes too long."""
        while self._line.since(number) is None:
            self._line.wait(number, PATIENCE)
