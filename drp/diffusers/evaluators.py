"""Evaluators of the drafts of a pipeline's call: the interface, and the evaluator in this process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from drp.diffusers.compiled import OriginalForward
from drp.diffusers.program import PROGRAM, Program, from_bytes
from drp.models.gpu import synchronize
from drp.models.state import ModuleState
from drp.protocol.arena import Arena
from drp.protocol.memory import LocalMemory
from drp.sampling.run import Task, batches
from drp.torch_threads import torch_threads


class Session(Protocol):
    """Evaluates drafts of one program, see `drp.leader.runs.session`. `arena` has the slots.

    `device_seconds` is the time of all evaluations so far; `incidents` are the losses of workers.
    """

    arena: Arena
    device_seconds: float
    incidents: list[str]

    def evaluate(self, tasks: Sequence[Task]) -> Mapping[int, int]:
        """Evaluate the drafts in the tasks' slots in parallel; return the row of each prediction by index."""
        ...

    def close(self) -> None:
        """Release the memory."""
        ...


class Evaluator(Protocol):
    """Opens sessions. `devices` are names; each evaluates up to `drafts_per_device` drafts as one batch.

    `verified` has hashes of the programs and environments with which the devices have the results of this process.
    """

    drafts_per_device: int
    verified: set[int]

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the devices."""
        ...

    def bind(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], slots: int, cond: Mapping[str, Tensor]
    ) -> Session:
        """Return a session whose slots hold tensors like `inputs` and `outputs`; `cond` includes the program."""
        ...


class InProcess:
    """Evaluates drafts in this process, with the batch size and the number of threads of a worker.

    `modules` are the modules as the pipeline calls them without drp.
    """

    def __init__(self, modules: Mapping[str, OriginalForward], threads: int, batch: int = 1) -> None:
        self._modules, self._threads, self.drafts_per_device = modules, threads, batch
        self.verified: set[int] = set()

    @property
    def devices(self) -> tuple[str, ...]:
        return ("this process",)

    def bind(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], slots: int, cond: Mapping[str, Tensor]
    ) -> Session:
        program, _ = from_bytes(bytes(cond[PROGRAM].numpy()))
        device = next((t.device for t in outputs.values() if t.device.type != "cpu"), torch.device("cpu"))
        arena = Arena.lay_out(0, inputs, outputs, slots, slots, cond, partial(LocalMemory, device=device))
        return _InProcessSession(arena, program, self._modules, self._threads, self.drafts_per_device)


class _InProcessSession:
    def __init__(
        self, arena: Arena, program: Program, modules: Mapping[str, OriginalForward], threads: int, batch: int
    ) -> None:
        self.arena, self._batch = arena, batch
        self.device_seconds = 0.0
        self.incidents: list[str] = []
        self._program, self._modules, self._threads = program, modules, threads
        self._state = ModuleState(*(forward.module for forward in modules.values()))

    def evaluate(self, tasks: Sequence[Task]) -> Mapping[int, int]:
        with torch_threads(self._threads), torch.no_grad():
            for group in batches(tasks, self._batch):
                began = time.perf_counter()
                inputs = [self.arena.draft(task.slot) for task in group]
                outputs = [self.arena.prediction(task.slot) for task in group]
                try:
                    self._program.run_batch(self._modules, inputs, self.arena.cond, outputs)
                finally:
                    self._state.restore()
                synchronize(self.arena.memory.device)
                self.device_seconds += time.perf_counter() - began
        return {task.index: task.slot for task in tasks}

    def close(self) -> None:
        self.arena.close()
