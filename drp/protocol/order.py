"""Order: answers that run ahead of the device. Work is queued on streams, and so is waiting for another process's.

A *stream* does what it is given in order, after the caller has gone on: on a GPU it is CUDA's, on the host a thread. A
*link* joins two streams: `record` says that what was queued so far is to count as done once it is, and `wait` has the
stream wait for what the other side recorded last. A *stamp* is written behind a prediction, and read before it is used:
it proves that what was read was finished, whatever became of the links.

Here is the host's side of it; `drp.protocol.cuda` has the GPU's.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from torch import Tensor

from drp.protocol.memory import ALIGNMENT

PAUSE = 50e-6
"""Seconds between two looks at a number that another process writes."""

CLOSING = 1.0
"""Seconds that what a closed stream is doing may still take: it cannot be broken off."""

STAMP = 2
"""int64 numbers of a stamp: its word, and the nanoseconds that the evaluation took, 0 if they are not known."""
UNREAD = -1
"""In place of a word: no stamp was read yet."""
FINE, NOT_FINITE, RAISED = 0, 1, 2
"""What a word says of a prediction beside the draft's sequence number."""
VERDICTS = 4

LINE = ALIGNMENT
"""Bytes of a link on the host: how often the leader has recorded, how much of that is done, and so for the worker."""


class Stream(Protocol):
    """Does what it is given in order. One thread gives."""

    def put(self, do: Callable[[], object]) -> None:
        """Have this done after what was given before; on a GPU, what `do` queues on the current stream."""
        ...

    def current(self) -> AbstractContextManager[object]:
        """Make it the current stream of this thread for a while: what is queued on the GPU is queued here."""
        ...

    def mark(self) -> Any:
        """Return a mark behind what was given so far."""
        ...

    def passed(self, mark: Any) -> bool:
        """Whether everything before the mark was done; never waits."""
        ...

    def settle(self) -> None:
        """Wait until everything was done. Only where nothing that was given waits for another process."""
        ...

    def aside(self) -> AbstractContextManager[object]:
        """Make another stream the current one for a while, for those who look at what was done before a mark."""
        ...

    def close(self) -> None:
        """Do no more."""
        ...


class Link(Protocol):
    """Joins a stream of this process to another process's."""

    def record(self) -> None:
        """Let the other side's next `wait` be for all that was queued here so far. Call it before the message."""
        ...

    def wait(self) -> None:
        """Have the stream wait for what the other side recorded last. Call it after a message."""
        ...

    def release(self) -> None:
        """Let the stream go on: the other side is gone, and what it recorded will not be done."""
        ...


class HostStream:
    """A thread that does what it is given in order: on the host what a stream is on a GPU."""

    def __init__(self, name: str) -> None:
        self._todo: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._given = self._done = 0
        self._error: BaseException | None = None
        self.closed = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def put(self, do: Callable[[], object]) -> None:
        """Have this done after what was given before; raise what something given before has raised."""
        if self._error is not None:
            raise self._error
        self._given += 1
        self._todo.put(do)

    def mark(self) -> int:
        """Return how much was given."""
        return self._given

    def passed(self, mark: int) -> bool:
        """Whether so much was done."""
        if self._error is not None:
            raise self._error
        return self._done >= mark

    def settle(self) -> None:
        """Wait until all was done."""
        while not self.passed(self._given):
            time.sleep(PAUSE)

    def current(self) -> AbstractContextManager[object]:
        """Do nothing: it is used by `put`."""
        return contextlib.nullcontext()

    def aside(self) -> AbstractContextManager[object]:
        """Do nothing: this thread may read what was done."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Drop what was not done; a wait is given up."""
        self.closed = True
        self._todo.put(None)
        self._thread.join(CLOSING)

    def _serve(self) -> None:
        torch.get_num_threads()  # At its first call a thread takes the process's number, which its sums then have.
        with torch.inference_mode():
            while (do := self._todo.get()) is not None and not self.closed:
                try:
                    do()
                except BaseException as error:  # told to the thread that gives
                    self._error = error
                    return
                self._done += 1
                del do  # It holds tensors, and the next may be long in coming.


class HostLink:
    """Counts in shared memory: how often each side has recorded, and how much of that is done.

    `line` are the four numbers, int64 on the host; `leads` says whether this is the leader's side. A wait that nobody
    ends is given up when the stream is closed; a leader ends those for a worker that is gone with `release`, and a
    worker's end with its leader.
    """

    def __init__(self, line: Tensor, leads: bool, stream: HostStream) -> None:
        self._line, self._stream = line.numpy(), stream
        self._mine, self._other = (0, 2) if leads else (2, 0)

    def record(self) -> None:
        """Count, and have the stream say when it is there."""
        self._line[self._mine] += 1
        self._stream.put(functools.partial(self._reach, int(self._line[self._mine])))

    def wait(self) -> None:
        """Have the stream wait until the other's is where it was last recorded."""
        self._stream.put(functools.partial(self._wait_for, int(self._line[self._other])))

    def release(self) -> None:
        """Count what the other has recorded as done."""
        self._line[self._other + 1] = self._line[self._other]

    def _reach(self, count: int) -> None:
        self._line[self._mine + 1] = count

    def _wait_for(self, count: int) -> None:
        while self._line[self._other + 1] < count and not self._stream.closed:
            time.sleep(PAUSE)


def word(sequence: int, verdict: int) -> int:
    """Return a stamp's word."""
    return sequence * VERDICTS + verdict


def verdict_of(said: int, sequence: int) -> int | None:
    """Return what a word says of the draft with this sequence number; None if it is another's, or none."""
    verdict = said - word(sequence, 0)
    return verdict if verdict in (FINE, NOT_FINITE, RAISED) else None


def stamp(place: Tensor, sequence: int, prediction: Iterable[Tensor], nanoseconds: int = 0) -> None:
    """Write the stamp of a prediction, on its device and by its current stream, to `place`, int64 [2]."""
    finite = torch.stack([tensor.isfinite().all() for tensor in prediction]).all()
    said = word(sequence, NOT_FINITE) - finite.long()
    place.copy_(torch.stack([said, torch.full_like(said, nanoseconds)]), non_blocking=True)
