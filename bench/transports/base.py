"""What all transports share: the work to do, the leader's loop over it, and the worker's answer to a draft."""

from __future__ import annotations

import itertools
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from drp.leader.devices import parse_emulated
from drp.leader.events import Timeline, TraceEvent
from drp.leader.job import Job, make_job
from drp.leader.request import Request
from drp.protocol.messages import Draft, ModelSpec
from drp.sampling.reference import run_reference
from drp.sampling.run import Run, Task
from drp.sampling.slot_allocator import slots
from drp.workers.emulated import EmulatedDevice, cheap

NO_COND: Mapping[str, Tensor] = {}
DEADLINE = 30.0
"""Seconds that any answer may take."""


@dataclass(frozen=True)
class Work:
    """Runs of `steps` steps in a mode, with a draft a round for each of `count` devices of the name `device`."""

    device: str
    count: int
    mode: str = "aggressive"
    steps: int = 48
    shape: tuple[int, ...] = (4, 64, 64)

    def job(self) -> Job:
        """Return solver, mode and noise, the same for all transports."""
        request = Request(shape=self.shape, steps=self.steps, mode=self.mode, drafts=self.count)
        return make_job(request, ModelSpec(), self.count)

    def reference(self) -> Tensor:
        """Return the samples that every carrier must get, bit for bit."""
        job = self.job()
        return run_reference(cheap, job.solver, job.mode, job.start, {}).samples


class Transport(ABC):
    """Workers that wait for runs; each is pinned to one core, the cores in turn."""

    name: ClassVar[str]

    def __init__(self, work: Work) -> None:
        self.work = work
        self.timeline: Timeline = []

    @abstractmethod
    def sample(self) -> Tensor:
        """Run once; return the samples, and leave the marks in `timeline`."""

    @abstractmethod
    def close(self) -> None:
        """End the workers."""


class Led(Transport):
    """A carrier with a leader in this process: the loop is drp's, and only `send` and `receive` differ."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        job = work.job()
        self.drafts, self.predictions = self.make_slots(slots(job.solver, job.mode), job.start)

    def make_slots(self, slots: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the matrices of drafts and predictions, [slots, D]."""
        return noise.new_zeros((slots, noise.numel())), noise.new_zeros((slots, noise.numel()))

    @abstractmethod
    def send(self, worker: int, task: Task) -> None:
        """Let a worker evaluate a draft."""

    @abstractmethod
    def receive(self) -> tuple[int, int, float]:
        """Return a worker, the index it has evaluated, and its seconds; the prediction is in its slot."""

    def mark(self, what: str, step: int = 0, worker: int = 0, seconds: float = 0.0) -> None:
        """Note what happens now."""
        self.timeline.append(TraceEvent(what, time.perf_counter_ns(), 0, step, worker, seconds))  # type: ignore[arg-type]

    def sample(self) -> Tensor:
        """Run once, in the order of DESIGN section 3: form, send, refine, collect."""
        job = self.work.job()
        run = Run(job.solver, job.mode, job.start, self.drafts, self.predictions)
        self.timeline = []
        self.mark("begin")
        for tasks in run.rounds():
            self.mark("scheduled")
            for task, worker in zip(tasks, itertools.cycle(range(self.work.count))):
                self.send(worker, task)
                self.mark("sent", task.index, worker)
            run.refine()
            for _ in tasks:
                worker, index, seconds = self.receive()
                self.mark("predicted", index, worker, seconds)
        run.refine()
        self.mark("end")
        return run.state.clone()


class Evaluator:
    """The worker's side: a pinned process with one thread, and an emulated device with cheap values."""

    def __init__(self, work: Work, number: int) -> None:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[number % len(cores)]})
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self.shape = (1, *work.shape)
        self.device = EmulatedDevice(parse_emulated(work.device, number))

    def evaluate(self, index: int, timestep: float, draft: Tensor, prediction: Tensor) -> float:
        """Fill `prediction` [D] from `draft` [D]; return the device's seconds."""

        def values() -> None:
            t = torch.full((1,), timestep, dtype=torch.float32)
            prediction.copy_(cheap(draft.view(self.shape), t, NO_COND).reshape(-1))

        draft_message, nbytes = Draft(0, index, timestep, 0, 0), draft.numel() * draft.element_size()
        began, _, ended, _ = self.device.run(draft_message, nbytes, values)
        return ended - began
