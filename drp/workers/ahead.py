"""Ahead: a worker has done with a draft as soon as its evaluation is queued. Here the queue is a thread, on the host.

It stands in for a stream of a GPU, in order and asynchronous like one, so that everything around it runs anywhere.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from drp.protocol.arena import Arena
from drp.protocol.bell import Bell
from drp.protocol.codec import ProtocolError
from drp.protocol.messages import Draft, End, Order
from drp.protocol.order import (
    LINE,
    PATIENCE,
    PAUSE,
    RAISED,
    RING,
    STAMP,
    UNWANTED,
    LeadersRecord,
    Line,
    Lines,
    OwnRecord,
    stamp_now,
    word,
)
from drp.protocol.waiting import be_punctual, lend_cores, sleep_until
from drp.workers.emulated import Times

CLOSING = 1.0
"""Seconds that what a closed stream is doing may still take: it cannot be broken off."""


@dataclass(frozen=True)
class Work:
    """A draft, or a batch of them: the tensors given, and those to be written, of each."""

    draft: Draft
    arena: Arena
    inputs: Sequence[Mapping[str, Tensor]]
    outputs: Sequence[Mapping[str, Tensor]]

    @property
    def timesteps(self) -> list[float]:
        """One a draft."""
        return [self.draft.timestep, *(also.timestep for also in self.draft.also)]

    @property
    def rows(self) -> list[int]:
        """One a draft."""
        return [self.draft.row, *(also.row for also in self.draft.also)]


class Ahead(Protocol):
    """What a worker that answers ahead of its device asks of it."""

    @property
    def busy(self) -> bool:
        """Whether something that was queued is not done. Raises what makes it impossible to go on."""
        ...

    def bind(self, run: int, arena: Arena) -> None:
        """Take up a run's records and stamps."""
        ...

    def put(self, work: Work) -> None:
        """Queue an evaluation, and the stamp behind it; what is raised here is raised before anything was answered."""
        ...

    def unbind(self, run: int) -> Any:
        """Let go of them; return what `bind_again` takes, None if there are none."""
        ...

    def bind_again(self, run: int, bound: Any) -> None:
        """Take up those of another run for this one, whose memory is the same, and was cleared."""
        ...

    def failed(self) -> list[tuple[Draft, BaseException]]:
        """Return the drafts that were answered, and then could not be evaluated; each once."""
        ...

    def settle(self) -> None:
        """Wait for what was queued."""
        ...

    def close(self) -> None:
        """Queue no more."""
        ...


class Bound:
    """What the leader records of a run, what this worker does, and its stamps, as the run's Bind says."""

    def __init__(self, arena: Arena, leaders: LeadersRecord, own: OwnRecord) -> None:
        assert arena.bind.order is not None
        self.leaders, self.own = leaders, own
        self.stamps = arena.memory.tensor(arena.bind.order.stamps, (arena.bind.rows, STAMP), torch.int64)


class HostBound(Bound):
    """Likewise, on the host; `places` are the stamps."""

    leaders: HostLeaders
    own: HostOwn

    def __init__(self, arena: Arena, leaders: HostLeaders, own: HostOwn) -> None:
        super().__init__(arena, leaders, own)
        self.places = self.stamps.numpy().data


def host_lines(arena: Arena) -> tuple[Tensor, Tensor]:
    """Return the leader's numbers [LINE / 8], and the workers' [workers, LINE / 8], for an arena on the host."""
    order = arena.bind.order
    assert order is not None
    if order.own >= order.workers:
        raise ProtocolError(f"the line {order.own} of {order.workers}")
    lines = arena.memory.tensor(order.lines, (1 + order.workers, LINE // 8), torch.int64)
    return lines[0], lines[1:]


class HostStream:
    """A thread that does what it is given in order: on the host what a stream is on a GPU.

    `time`, in nanoseconds of CLOCK_MONOTONIC, is when what was done counts as done, if that is not at once: what it
    waits for, and what it says of itself, is as of then.
    """

    def __init__(self) -> None:
        self._todo: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._given = self._done = 0
        self._error: BaseException | None = None
        self.time = 0
        self.lends = False
        """Whether somebody else has the thread's cores until it has what it waits for."""
        self.closed = False
        self._thread = threading.Thread(target=self._serve, name="drp-worker", daemon=True)
        self._thread.start()

    def put(self, do: Callable[[], object]) -> None:
        """Have this done after what was given before; raise what something given before has raised."""
        if self._error is not None:
            raise self._error
        self._given += 1
        self._todo.put(do)

    @property
    def busy(self) -> bool:
        """Whether not all of it was done; raises what something given has raised."""
        if self._error is not None:
            raise self._error
        return self._done < self._given

    def settle(self) -> None:
        """Wait until all was done, and counts as done."""
        while self.busy:
            time.sleep(PAUSE)
        sleep_until(self.time / 1e9)

    def close(self) -> None:
        """Drop what was not done; a wait is given up."""
        self.closed = True
        self._todo.put(None)
        self._thread.join(CLOSING)

    def _serve(self) -> None:
        torch.get_num_threads()  # At its first call a thread takes the process's number, which its sums then have.
        be_punctual()
        with torch.inference_mode():
            while (do := self._todo.get()) is not None and not self.closed:
                try:
                    do()
                except BaseException as error:  # told to the thread that gives
                    self._error = error
                    return
                self._done += 1
                del do  # It holds tensors, and the next may be long in coming.


class HostOwn:
    """A worker's own records, as its thread makes them: among the `lines` of all, as the `order` says.

    It rings the leader's bell where that is wanted, and may lend the leader its cores.
    """

    def __init__(self, lines: Tensor, order: Order, stream: HostStream, bell: Bell | None) -> None:
        self._line, self._lines = Line(lines[order.own]), Lines(lines)
        self._own, self._thread, self._stream, self._bell = order.own, order.thread, stream, bell

    def restart(self) -> None:
        """Count from what the memory says."""
        self._line.restart()

    def record(self) -> int:
        """Count, and have the thread say when it is there."""
        count = self._line.count()
        self._stream.put(functools.partial(self._reach, count))
        return count

    def _reach(self, count: int) -> None:
        last = self._line.since(count - RING)
        if last is not None and not self._stream.closed:
            sleep_until(last / 1e9)  # Whoever waits for the record that had this place must have seen it.
        self._line.reach(count, max(self._stream.time, time.perf_counter_ns()))
        told = self._lines.told(self._own, count)
        if told and self._bell is not None:
            if told == "alone" and self._thread is not None:
                lend_cores(self._thread)
                self._stream.lends = True
            self._bell.ring()


class HostLeaders:
    """The leader's records, for which a worker's thread waits: at first awake, for some seconds."""

    def __init__(self, line: Tensor, stream: HostStream, awake: float) -> None:
        self._line, self._stream, self._awake = Line(line), stream, awake

    def wait(self, number: int) -> None:
        """Have the thread wait until the leader has come so far."""
        self._stream.put(functools.partial(self._wait_for, number))

    def is_dropped(self, number: int) -> bool:
        """Whether nobody wants what waits for this record any more."""
        return self._line.is_dropped(number)

    def _wait_for(self, count: int) -> None:
        while (since := self._line.since(count)) is None:
            if self._stream.closed:
                return
            self._line.wait(count, PATIENCE, 0.0 if self._stream.lends else self._awake)
        self._stream.lends = False
        self._stream.time = max(self._stream.time, since)


class HostAhead:
    """A thread that evaluates what was answered, in order.

    `evaluate` is given since when it might have, in seconds of perf_counter, and says when it had begun, had the
    prediction, had it in its row, and when it was there for whoever waits. An emulated device is at work until then,
    while this thread goes on: it starts the next evaluation when it is done with the last, not when the thread is.
    """

    def __init__(self, evaluate: Callable[[Work, float], Times]) -> None:
        self._evaluate = evaluate
        self._stream = HostStream()
        self._runs: dict[int, HostBound] = {}
        self._bells: dict[End, Bell] = {}
        self._failed: deque[tuple[Draft, BaseException]] = deque()

    @property
    def busy(self) -> bool:
        """Whether something was given that is not done."""
        return self._stream.busy or bool(self._failed)

    def bind(self, run: int, arena: Arena) -> None:
        """Take up a run's records and stamps."""
        order = arena.bind.order
        assert order is not None
        if order.bell is not None and order.bell not in self._bells:
            self._bells[order.bell] = Bell(order.bell)
        leaders, workers = host_lines(arena)
        bell = self._bells[order.bell] if order.bell is not None else None
        own = HostOwn(workers, order, self._stream, bell)
        self._runs[run] = HostBound(arena, HostLeaders(leaders, self._stream, order.awake), own)

    def unbind(self, run: int) -> HostBound | None:
        """Let go of them."""
        return self._runs.pop(run, None)

    def bind_again(self, run: int, bound: HostBound) -> None:
        """Take up those of another run."""
        bound.own.restart()
        self._runs[run] = bound

    def failed(self) -> list[tuple[Draft, BaseException]]:
        """Return what could not be evaluated, each draft once."""
        return [self._failed.popleft() for _ in range(len(self._failed))]

    def settle(self) -> None:
        """Wait for the thread, and for the device that it stands for."""
        self._stream.settle()

    def close(self) -> None:
        """End the thread."""
        self._stream.close()
        for bell in self._bells.values():
            bell.close()

    def put(self, work: Work) -> None:
        """Have the thread evaluate a draft and stamp it, once the leader has written it."""
        bound = self._runs[work.draft.run]
        bound.leaders.wait(work.draft.after)
        self._stream.put(functools.partial(self._do, bound, work, time.perf_counter_ns()))
        bound.own.record()

    def _do(self, bound: HostBound, work: Work, given: int) -> None:
        draft = work.draft
        if bound.leaders.is_dropped(draft.after):
            for row in work.rows:
                bound.places[row, 0] = word(draft.sequence, UNWANTED)
            return
        try:
            times = self._evaluate(work, max(self._stream.time, given) / 1e9)
        except BaseException as error:  # the denoiser's: the stamp says that there is none, and a Fault says why
            self._failed.append((draft, error))
            for row in work.rows:
                bound.places[row, 0] = word(draft.sequence, RAISED)
            return
        self._stream.time = round(times.there * 1e9)
        for place, (row, output) in enumerate(zip(work.rows, work.outputs, strict=True)):
            took = round((times.ended - times.began) * 1e9) if place == 0 else 0  # a batch's, once
            stamp_now(bound.places, row, draft.sequence, output.values(), took, round(times.ended * 1e9))
