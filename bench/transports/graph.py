"""A compiled graph of Ray: channels that are laid out once, in which each round writes its drafts and predictions."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from bench.transports.actors import Actor
from bench.transports.base import DEADLINE, Led, Work
from drp.sampling.run import Task

ray: Any = importlib.import_module("ray")  # an extra; where it is missing, nothing can know its types


class Graph(Led):
    """All workers take part in every execution: a round with fewer drafts repeats its first one."""

    name = "Ray compiled graph"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        dag: Any = importlib.import_module("ray.dag")
        self.actors = [ray.remote(GraphActor).options(num_cpus=1).remote(work, n) for n in range(work.count)]
        ray.get([actor.ready.remote() for actor in self.actors], timeout=2 * DEADLINE)
        with dag.InputNode() as given:
            ends = [actor.evaluate_item.bind(given[n]) for n, actor in enumerate(self.actors)]
            graph = dag.MultiOutputNode(ends)
        self.graph = graph.experimental_compile(_buffer_size_bytes=1 << 26)
        self.drafts_sent: list[tuple[int, int, float, Any]] = []
        self.answers: list[tuple[int, int, int, float, Any]] = []

    def send(self, worker: int, task: Task) -> None:
        """Note the draft: the whole round is sent at once."""
        self.drafts_sent.append((task.index, task.slot, task.timestep, self.drafts[task.slot].numpy()))

    def receive(self) -> tuple[int, int, float]:
        """Execute the graph for the drafts that were noted; copy a prediction into its slot."""
        if self.drafts_sent:
            drafts, self.drafts_sent = self.drafts_sent, []
            rest = [drafts[0]] * (self.work.count - len(drafts))
            self.answers = ray.get(self.graph.execute(*drafts, *rest), timeout=DEADLINE)[: len(drafts)]
        worker, index, slot, seconds, prediction = self.answers.pop()
        with torch.no_grad():
            self.predictions[slot] = torch.tensor(prediction)
        return worker, index, seconds

    def close(self) -> None:
        """End the graph and its actors."""
        self.graph.teardown(kill_actors=True)


class GraphActor(Actor):
    """A worker whose draft comes as one value."""

    def evaluate_item(self, item: Any) -> tuple[int, int, int, float, Any]:
        """Return worker, index, slot, seconds and the prediction."""
        return self.evaluate(*item)
