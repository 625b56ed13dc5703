"""Worker: evaluates drafts. One role, one loop."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from dataclasses import replace

import torch

from drp.models import Denoiser, load
from drp.protocol.arena import Arena
from drp.protocol.codec import ProtocolError
from drp.protocol.memory import SharedMemory
from drp.protocol.messages import (
    VERSION,
    Bind,
    Bound,
    Draft,
    Failed,
    Hello,
    Load,
    Loaded,
    Prediction,
    Share,
    Shared,
    Stop,
    ToLeader,
    ToWorker,
    Unbind,
)
from drp.protocol.transport import WorkerSocket
from drp.workers import lifeline
from drp.workers.emulated import EmulatedDevice, cheap
from drp.workers.weights import Weights

PATIENCE = 1.0
"""Seconds of one wait for a message."""


class Worker:
    """A process's share of the work: it answers the leader's messages one after the other."""

    def __init__(self, endpoint: str, identity: bytes, threads: int, from_main_thread: bool) -> None:
        torch.set_num_threads(threads)
        self._socket = WorkerSocket(endpoint, identity)
        self._from_main_thread = from_main_thread
        self._denoiser: Denoiser | None = None
        self._weights = Weights(None)
        self._arenas: dict[int, Arena] = {}
        self._timed = _timed

    def run(self) -> None:
        """Answer messages until Stop; an error is told to the leader, and ends the worker."""
        self._socket.send(Hello(VERSION, os.getpid()))
        message: ToWorker | None = None
        try:
            while not isinstance(message := self._socket.receive(PATIENCE), Stop):
                answer = self._answer(message) if message is not None else None
                if answer is not None:
                    self._socket.send(answer)
        except Exception as error:
            summary = f"{type(error).__name__}: {error}"
            self._socket.send(Failed(_doing(message), summary[:2000], traceback.format_exc()[-20_000:]))
        finally:
            self._socket.close()

    def _answer(self, message: ToWorker) -> ToLeader | None:
        match message:
            case Draft():
                return self._evaluate(message)
            case Bind():
                self._arenas[message.run] = Arena.open(message)
                return Bound(message.run)
            case Unbind():
                self._arenas.pop(message.run, None)
            case Load():
                if self._from_main_thread:  # Not sooner: until here the socket has a name, for a worker to clear away.
                    lifeline.die_with_parent_thread()
                self._denoiser = load(message.model)
                if message.emulated is not None:
                    self._timed = EmulatedDevice(message.emulated).run
                    if message.emulated.cheap:
                        self._denoiser = replace(self._denoiser, predict=cheap)
                self._weights = Weights(self._denoiser.module)
                return Loaded(self._denoiser.spec, self._weights.nbytes, self._weights.layout)
            case Share():
                memory = SharedMemory.open(message.memory)
                self._weights.share(memory, message.publish)
                memory.close()
                return Shared()
        return None

    @torch.inference_mode()
    def _evaluate(self, draft: Draft) -> Prediction | None:
        arena = self._arenas.get(draft.run)
        if arena is None:
            return None  # The run was ended while this draft was on its way.
        if draft.slot >= arena.bind.slots:
            raise ProtocolError(f"slot {draft.slot}; the run has {arena.bind.slots}")
        inputs, outputs = arena.draft(draft.slot), arena.prediction(draft.slot)

        def evaluate() -> None:
            assert self._denoiser is not None
            self._denoiser.evaluate(inputs, draft.timestep, arena.cond, outputs)

        seconds = self._timed(draft, sum(tensor.nbytes for tensor in inputs.values()), evaluate)
        return Prediction(draft.run, draft.index, draft.slot, seconds)


def _timed(draft: Draft, nbytes: int, evaluate: Callable[[], None]) -> float:
    began = time.perf_counter()
    evaluate()
    return time.perf_counter() - began


def _doing(message: ToWorker | None) -> str:
    match message:
        case Draft():
            return f"evaluating step {message.index} of run {message.run}"
        case Load():
            return f"loading model {message.model!r}"[:200]
        case None:
            return "waiting"
        case _:
            return f"handling {type(message).__name__}"
