"""The floor: a pipe to each worker and one back, latents in shared memory, nothing checked."""

from __future__ import annotations

import multiprocessing
import os
import select
import struct
from multiprocessing.connection import Connection

from torch import Tensor

from bench.transports.base import DEADLINE, Evaluator, Led, Work
from drp.protocol.arena import Arena
from drp.protocol.messages import Bind
from drp.sampling.run import Task

DRAFT = struct.Struct("<iid")  # index, slot, timestep
ANSWER = struct.Struct("<iid")  # worker, index, seconds


class Pipes(Led):
    """A few bytes through pipes."""

    name = "pipes (floor)"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        spawn = multiprocessing.get_context("spawn")
        self.answers, back = spawn.Pipe(duplex=False)
        self.pipes, self.processes = [], []
        for number in range(work.count):
            there, pipe = spawn.Pipe(duplex=False)
            process = spawn.Process(target=answer, args=(work, number, self.arena.bind, there, back), daemon=True)
            process.start()
            there.close()
            self.pipes.append(pipe)
            self.processes.append(process)
        back.close()
        self.poll = select.poll()
        self.poll.register(self.answers.fileno(), select.POLLIN)
        for _ in self.processes:
            self.receive()  # every worker says once that it is there

    def make_slots(self, slots: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Put them where the workers can map them."""
        self.arena = Arena.create(0, noise, slots, slots, {})
        return self.arena.drafts, self.arena.predictions

    def send(self, worker: int, task: Task) -> None:
        """Write 16 bytes."""
        os.write(self.pipes[worker].fileno(), DRAFT.pack(task.index, task.slot, task.timestep))

    def receive(self) -> tuple[int, int, float]:
        """Read 16 bytes; so few are written as one."""
        if not self.poll.poll(DEADLINE * 1000):
            raise TimeoutError("pipes: no answer")
        data = os.read(self.answers.fileno(), ANSWER.size)
        if not data:
            raise RuntimeError("pipes: all workers are gone")
        worker, index, seconds = ANSWER.unpack(data)
        return worker, index, seconds

    def close(self) -> None:
        """Close the pipes; the workers end."""
        for pipe in [*self.pipes, self.answers]:
            pipe.close()
        for process in self.processes:
            process.join(DEADLINE)
        self.arena.close()


def answer(work: Work, number: int, bind: Bind, there: Connection, back: Connection) -> None:
    """Evaluate until the pipe is closed."""
    evaluator, arena = Evaluator(work, number), Arena.open(bind)
    os.write(back.fileno(), ANSWER.pack(number, 0, 0.0))
    while data := os.read(there.fileno(), DRAFT.size):
        index, slot, timestep = DRAFT.unpack(data)
        seconds = evaluator.evaluate(index, timestep, arena.drafts[slot], arena.predictions[slot])
        os.write(back.fileno(), ANSWER.pack(number, index, seconds))
