"""Inline tensors: tensors that travel in frames after a message, between a leader and a worker on another machine.

Each side has its own arena for a run, laid out as the Bind describes. The sender adds the part of its arena that
the receiver needs, and the receiver copies it to the same place in its own:

    message     frames after it
    Bind        the conditions
    Draft       the draft's slot, and one slot for each batched draft
    Prediction  the row of the prediction, and one row for each batched draft

A slot, a row or the conditions are one frame: their bytes in the arena, with the padding between tensors. No other
message has frames. Both sides know the length of every frame in advance, and refuse any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from torch import Tensor

from drp.errors import ProtocolError
from drp.protocol.arena import Arena, nbytes_of
from drp.protocol.buffer_pool import BufferPool
from drp.protocol.client_messages import MAX_FRAME_NBYTES
from drp.protocol.codec import MAX_MESSAGE, decode, encode
from drp.protocol.frames import Frame
from drp.protocol.memory import MAX_RETAINED_NBYTES
from drp.protocol.messages import (
    TO_LEADER,
    TO_WORKER,
    Bind,
    Draft,
    EvaluationError,
    Prediction,
    Rebind,
    ToLeader,
    ToWorker,
    Unbind,
)

Message = TypeVar("Message")
Key = tuple[int, int, int]
"""Run, index and row of a draft, which its answer repeats."""


class LeaderFrames:
    """The leader's side of one worker: makes frames of drafts, and copies predictions into the arenas of the runs.

    open_arena: returns the arena of the leader's that a Bind describes.
    """

    def __init__(self, open_arena: Callable[[Bind], Arena]) -> None:
        self._open_arena = open_arena
        self._arenas: dict[int, Arena] = {}
        self._in_flight: dict[Key, Draft] = {}
        self._retained: Bind | None = None

    def encode(self, message: ToWorker) -> list[Frame]:
        """Return the frames of a message; raise ValueError for a run whose tensors are too long to be sent.

        A run whose memory is kept for the next one has no counterpart here, since the conditions differ: the worker is
        sent a Bind instead of a Rebind.
        """
        match message:
            case Bind():
                return self._bind(message)
            case Rebind(run, acknowledge) if self._retained is not None:
                return self._bind(replace(self._retained, run=run, acknowledge=acknowledge))
            case Draft():
                arena = self._arenas[message.run]
                self._in_flight[message.run, message.index, message.row] = message
                slots = (message.slot, *(draft.slot for draft in message.batched))
                return [encode(message), *(_view(arena.slot_bytes[slot]) for slot in slots)]
            case Unbind():
                arena = self._arenas.pop(message.run)
                self._retained = arena.bind if message.keep else self._retained
                return [encode(Unbind(message.run))]
        return [encode(message)]

    def decode(self, frames: Sequence[Frame]) -> ToLeader:
        """Return a message, after its predictions were copied into the run's arena.

        Raises ProtocolError if it is no message, or its frames are not those that are due.
        """
        message = decode(_head(frames), TO_LEADER)
        if not isinstance(message, Prediction | EvaluationError):
            return _without_frames(message, frames)
        draft = self._in_flight.pop((message.run, message.index, message.row), None)
        if draft is None:
            raise ProtocolError(f"{message} answers no draft")
        if isinstance(message, EvaluationError):
            return _without_frames(message, frames)
        arena = self._arenas[message.run]
        rows = (draft.row, *(each.row for each in draft.batched))
        _fill([arena.row_bytes[row] for row in rows], frames)
        return message

    def _bind(self, bind: Bind) -> list[Frame]:
        arena = self._open_arena(bind)
        longest = max(arena.slot_bytes.shape[1], arena.row_bytes.shape[1], arena.cond_bytes.nbytes)
        if longest > MAX_FRAME_NBYTES:
            raise ValueError(
                f"a draft, a prediction or the conditions are {longest} bytes long; at most {MAX_FRAME_NBYTES} are "
                "sent to a worker on another machine; sample fewer at once"
            )
        self._arenas[bind.run] = arena
        return [encode(replace(bind, memory=None, number=0)), _view(arena.cond_bytes)]


class WorkerFrames:
    """The worker's side: copies drafts into arenas in its own memory, which a Bind then names like memory of a leader.

    Successive runs reuse the same memory, since allocating it takes longer than sending a draft.
    """

    def __init__(self) -> None:
        self._pool = BufferPool(MAX_RETAINED_NBYTES)
        self._arenas: dict[int, Arena] = {}
        self._in_flight: dict[Key, Draft] = {}

    def decode(self, frames: Sequence[Frame]) -> ToWorker:
        """Return a message, after its tensors were copied; a Bind names memory of this process.

        Raises ProtocolError if it is no message, or its frames are not those that are due.
        """
        message = decode(_head(frames), TO_WORKER)
        match message:
            case Bind():
                return self._bind(message, frames)
            case Draft():
                arena = self._arenas.get(message.run)
                slots = (message.slot, *(draft.slot for draft in message.batched))
                if arena is None or max(slots) >= arena.bind.slots:
                    raise ProtocolError(f"a draft in slot {max(slots)} of run {message.run}, which is not bound so")
                _fill([arena.slot_bytes[slot] for slot in slots], frames)
                self._in_flight[message.run, message.index, message.row] = message
                return message
            case Unbind() if message.run in self._arenas:
                self._arenas.pop(message.run).close()
        return _without_frames(message, frames)

    def encode(self, message: ToLeader) -> list[Frame]:
        if isinstance(message, Prediction | EvaluationError):
            draft = self._in_flight.pop((message.run, message.index, message.row))
            if isinstance(message, Prediction):
                rows = (draft.row, *(each.row for each in draft.batched))
                return [encode(message), *(_view(self._arenas[message.run].row_bytes[row]) for row in rows)]
        return [encode(message)]

    def close(self) -> None:
        self._pool.close()
        while self._arenas:
            self._arenas.popitem()[1].close()

    def _bind(self, bind: Bind, frames: Sequence[Frame]) -> Bind:
        if bind.memory is not None or bind.gpu is not None or bind.async_config is not None:
            raise ProtocolError("a Bind names memory of another machine")
        memory = self._pool.acquire(nbytes_of(bind))
        try:
            arena = Arena(memory, replace(bind, memory=memory.handle, number=memory.number))
            _fill([arena.cond_bytes], frames)
        except BaseException:
            memory.close()
            raise
        self._arenas[bind.run] = arena
        return arena.bind


def _head(frames: Sequence[Frame]) -> bytes:
    if not frames or len(frames[0]) > MAX_MESSAGE:
        raise ProtocolError(f"no message, or one of more than {MAX_MESSAGE} bytes")
    return bytes(frames[0])


def _without_frames(message: Message, frames: Sequence[Frame]) -> Message:
    if len(frames) > 1:
        raise ProtocolError(f"{len(frames) - 1} frames after a {type(message).__name__}, which has none")
    return message


def _view(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor uint8 as they are when the message is sent, which must be before they change."""
    return tensor.numpy().data


def _fill(targets: Sequence[Tensor], frames: Sequence[Frame]) -> None:
    """Copy the frames after a message to tensors uint8; raise ProtocolError if they are not as many and as long."""
    due, came = [target.nbytes for target in targets], [len(frame) for frame in frames[1:]]
    if came != due:
        raise ProtocolError(f"frames of {came} bytes, where {due} are due")
    for target, frame in zip(targets, frames[1:], strict=True):
        if len(frame):
            target.numpy()[:] = np.frombuffer(frame, np.uint8)
