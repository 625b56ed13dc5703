"""multiprocessing queues: latents pickled as arrays, a queue to each worker and one back."""

from __future__ import annotations

import multiprocessing
from multiprocessing.queues import Queue
from typing import Any

import torch

from bench.transports.base import DEADLINE, Evaluator, Led, Work
from drp.sampling.run import Task


class Queues(Led):
    """Arrays through multiprocessing.Queue."""

    name = "queues"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        spawn = multiprocessing.get_context("spawn")
        self.answers: Queue[Any] = spawn.Queue()
        self.queues: list[Queue[Any]] = [spawn.Queue() for _ in range(work.count)]
        self.processes = [
            spawn.Process(target=answer, args=(work, number, queue, self.answers), daemon=True)
            for number, queue in enumerate(self.queues)
        ]
        for process in self.processes:
            process.start()
        for _ in self.processes:
            self.answers.get(timeout=DEADLINE)  # every worker says once that it is there

    def send(self, worker: int, task: Task) -> None:
        """Hand the draft to the queue's thread."""
        self.queues[worker].put((task.index, task.slot, task.timestep, self.drafts[task.slot].numpy()))

    def receive(self) -> tuple[int, int, float]:
        """Copy a prediction into its slot."""
        worker, index, slot, seconds, prediction = self.answers.get(timeout=DEADLINE)
        self.predictions[slot] = torch.from_numpy(prediction)
        return worker, index, seconds

    def close(self) -> None:
        """Tell the workers to end."""
        for queue in self.queues:
            queue.put(None)
        for process in self.processes:
            process.join(DEADLINE)


def answer(work: Work, number: int, drafts: Queue[Any], answers: Queue[Any]) -> None:
    """Evaluate until None comes."""
    evaluator = Evaluator(work, number)
    answers.put(None)
    while (message := drafts.get()) is not None:
        index, slot, timestep, draft = message
        prediction = torch.empty(len(draft))
        seconds = evaluator.evaluate(index, timestep, torch.from_numpy(draft), prediction)
        answers.put((number, index, slot, seconds, prediction.numpy()))
