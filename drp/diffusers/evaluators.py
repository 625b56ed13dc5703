"""Evaluators: who evaluates the drafts of a pipeline's call: workers, or, for reference, this process."""

from __future__ import annotations

import time
import types
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from drp.diffusers.program import PROGRAM, Program, to_tensor
from drp.diffusers.pytree import Json
from drp.models.state import ModuleState
from drp.protocol.arena import Arena
from drp.sampling.run import Task
from drp.torch_threads import torch_threads


class Session(Protocol):
    """One program, while drafts of it are evaluated, as of `drp.leader.runs.session`. `arena` has its slots.

    `device_seconds` is what evaluations have taken so far, `incidents` what happened to workers meanwhile.
    """

    arena: Arena
    device_seconds: float
    incidents: list[str]

    def evaluate(self, tasks: Sequence[Task]) -> Mapping[int, int]:
        """Evaluate the drafts in the tasks' slots, all at once; return by index the row of each prediction."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class Evaluator(Protocol):
    """Makes sessions. `devices` are names."""

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the places where drafts are evaluated."""
        ...

    def bind(
        self,
        program: Program,
        sources: Mapping[str, Json],
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        slots: int,
        cond: Mapping[str, Tensor],
    ) -> Session:
        """Return a session whose slots hold tensors like `inputs` and `outputs`."""
        ...


class InProcess:
    """This process, on its own modules, one draft at a time, with as many threads as a worker has.

    `modules` are their forward methods.
    """

    def __init__(self, modules: Mapping[str, types.MethodType], threads: int) -> None:
        self._modules, self._threads = modules, threads

    @property
    def devices(self) -> tuple[str, ...]:
        return ("this process",)

    def bind(
        self,
        program: Program,
        sources: Mapping[str, Json],
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        slots: int,
        cond: Mapping[str, Tensor],
    ) -> Session:
        arena = Arena.lay_out(0, inputs, outputs, slots, slots, {**cond, PROGRAM: to_tensor(program, sources)})
        return _InProcessSession(arena, program, self._modules, self._threads)


class _InProcessSession:
    def __init__(self, arena: Arena, program: Program, modules: Mapping[str, types.MethodType], threads: int) -> None:
        self.arena = arena
        self.device_seconds = 0.0
        self.incidents: list[str] = []
        self._program, self._modules, self._threads = program, modules, threads
        self._state = ModuleState(*(cast("nn.Module", forward.__self__) for forward in modules.values()))

    def evaluate(self, tasks: Sequence[Task]) -> Mapping[int, int]:
        with torch_threads(self._threads), torch.no_grad():
            for task in tasks:
                began = time.perf_counter()
                inputs, outputs = self.arena.draft(task.slot), self.arena.prediction(task.slot)
                try:
                    self._program.run(self._modules, inputs, self.arena.cond, outputs)
                finally:
                    self._state.restore()
                self.device_seconds += time.perf_counter() - began
        return {task.index: task.slot for task in tasks}

    def close(self) -> None:
        self.arena.close()
