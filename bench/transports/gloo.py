"""torch.distributed with gloo: no leader; every rank does the arithmetic, and all-gathers the predictions."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bench.transports.base import DEADLINE, Evaluator, Transport, Work
from drp.leader.events import Timeline, TraceEvent
from drp.sampling.run import Run
from drp.sampling.slot_allocator import slots


class Gloo(Transport):
    """A process a rank; a round is one all-gather."""

    name = "gloo"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        spawn = multiprocessing.get_context("spawn")
        self.store = tempfile.TemporaryDirectory(prefix="drp-gloo-")
        self.pipes, self.processes = [], []
        for rank in range(work.count):
            here, there = spawn.Pipe()
            process = spawn.Process(target=run_rank, args=(work, rank, Path(self.store.name), there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        for pipe in self.pipes:
            self._receive(pipe)

    def sample(self) -> Tensor:
        """Let all ranks run once; the first tells of it."""
        for pipe in self.pipes:
            pipe.send(True)
        for pipe in self.pipes:
            report = self._receive(pipe)
            if report is not None:
                self.timeline, array = report
        return torch.from_numpy(array)

    def _receive(self, pipe: Connection) -> tuple[Timeline, object] | None:
        if not pipe.poll(2 * DEADLINE):
            raise TimeoutError("gloo: no answer")
        report: tuple[Timeline, object] | None = pipe.recv()
        return report

    def close(self) -> None:
        """End the ranks."""
        for pipe in self.pipes:
            pipe.send(False)
        for process in self.processes:
            process.join(DEADLINE)
        self.store.cleanup()


def run_rank(work: Work, rank: int, store: Path, pipe: Connection) -> None:
    """Run as often as told."""
    evaluator = Evaluator(work, rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store / 'store'}",
        rank=rank,
        world_size=work.count,
        timeout=timedelta(seconds=DEADLINE),
    )
    pipe.send(None)
    while pipe.recv():
        timeline, samples = sample(work, rank, evaluator)
        pipe.send((timeline, samples.numpy()) if rank == 0 else None)
    dist.destroy_process_group()


def sample(work: Work, rank: int, evaluator: Evaluator) -> tuple[Timeline, Tensor]:
    """Run once: form all drafts, evaluate this rank's, gather the others'."""
    job = work.job()
    width = job.start.numel()
    drafts, predictions = (job.start.new_zeros((slots(job.solver, job.mode), width)) for _ in range(2))
    run = Run(job.solver, job.mode, job.start, drafts, predictions)
    own = torch.zeros(width + 2)  # a prediction, and its device's seconds as float64
    everyones = [torch.empty_like(own) for _ in range(work.count)]
    dist.barrier()
    timeline = [TraceEvent("begin", time.perf_counter_ns(), 0)]
    for tasks in run.rounds():
        timeline.append(TraceEvent("scheduled", time.perf_counter_ns(), 0))
        if rank < len(tasks):
            task = tasks[rank]
            seconds = evaluator.evaluate(task.index, task.timestep, drafts[task.slot], own[:-2])
            own[-2:].copy_(torch.tensor([seconds], dtype=torch.float64).view(torch.float32))
        gathering = dist.all_gather(everyones, own, async_op=True)
        run.refine()
        gathering.wait()
        now = time.perf_counter_ns()
        for worker, (task, gathered) in enumerate(zip(tasks, everyones[: len(tasks)], strict=True)):
            predictions[task.slot] = gathered[:-2]
            seconds = float(gathered[-2:].view(torch.float64))
            timeline += [
                TraceEvent("sent", timeline[-1].ns, 0, task.index, worker),
                TraceEvent("predicted", now, 0, task.index, worker, seconds),
            ]
    run.refine()
    timeline.append(TraceEvent("end", time.perf_counter_ns(), 0))
    return timeline, run.state.clone()
