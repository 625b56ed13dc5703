"""Ray actors: a method call with an array, an array back."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from bench.transports.base import DEADLINE, Evaluator, Led, Work
from drp.sampling.run import Task

ray: Any = importlib.import_module("ray")  # an extra; where it is missing, nothing can know its types


class Actors(Led):
    """An actor a worker; all answers of a round are got together."""

    name = "ray"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.own_cluster = not ray.is_initialized()
        if self.own_cluster:
            ray.init(num_cpus=work.count, include_dashboard=False, log_to_driver=False, configure_logging=False)
        self.actors = [ray.remote(Actor).options(num_cpus=1).remote(work, number) for number in range(work.count)]
        ray.get([actor.ready.remote() for actor in self.actors], timeout=2 * DEADLINE)
        self.calls: list[Any] = []
        self.answers: list[tuple[int, int, int, float, Any]] = []

    def send(self, worker: int, task: Task) -> None:
        """Call the actor."""
        draft = self.drafts[task.slot].numpy()
        self.calls.append(self.actors[worker].evaluate.remote(task.index, task.slot, task.timestep, draft))

    def receive(self) -> tuple[int, int, float]:
        """Copy a prediction into its slot."""
        if self.calls:
            self.answers, self.calls = ray.get(self.calls, timeout=DEADLINE), []
        worker, index, slot, seconds, prediction = self.answers.pop()
        with torch.no_grad():
            self.predictions[slot] = torch.tensor(prediction)
        return worker, index, seconds

    def close(self) -> None:
        """End the actors, and Ray if this has started it."""
        for actor in self.actors:
            ray.kill(actor)
        if self.own_cluster:
            ray.shutdown()


class Actor:
    """A worker."""

    def __init__(self, work: Work, number: int) -> None:
        self.number = number
        self.evaluator = Evaluator(work, number)

    def ready(self) -> None:
        """Return when it is there."""

    def evaluate(self, index: int, slot: int, timestep: float, draft: Any) -> tuple[int, int, int, float, Any]:
        """Return worker, index, slot, seconds and the prediction."""
        prediction = torch.empty(len(draft))
        seconds = self.evaluator.evaluate(index, timestep, torch.tensor(draft), prediction)
        return self.number, index, slot, seconds, prediction.numpy()
