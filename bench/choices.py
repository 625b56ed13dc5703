"""Which sockets, polling, pinning and threads? The same aggressive runs, one thing changed at a time, in turn.

Messages are drp's own, encoded and checked; latents lie in shared memory. Only what is named differs.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import shutil
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import zmq
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from bench.figures import console
from bench.rounds import RunTime, split, summary
from bench.transports.base import DEADLINE, Evaluator, Led, Work
from drp.protocol.arena import Arena
from drp.protocol.codec import decode, encode
from drp.protocol.messages import TO_LEADER, TO_WORKER, Bind, Draft, Prediction
from drp.sampling.run import Task

TURNS = 12
Pattern = Literal["router/dealer", "pair", "socketpair"]


@dataclass
class Choice:
    """What is chosen.

    spin: seconds that the leader asks again and again for a message before it sleeps.
    threads: on which the leader does its arithmetic.
    """

    pattern: Pattern = "router/dealer"
    spin: float = 0.0
    pin_workers: bool = True
    pin_leader: bool = False
    threads: int = 1


CHOICES = {
    "router/dealer": Choice(),
    "a pair a worker": Choice("pair"),
    "a socketpair a worker": Choice("socketpair"),
    "spin 50 us": Choice(spin=50e-6),
    "spin 500 us": Choice(spin=500e-6),
    "spin on": Choice(spin=DEADLINE),
    "leader pinned": Choice(pin_leader=True),
    "workers not pinned": Choice(pin_workers=False),
    "leader with 2 threads": Choice(threads=2),
}


class End(ABC):
    """One process's end of the connections."""

    @abstractmethod
    def send(self, peer: int, data: bytes) -> None:
        """Send to a peer."""

    @abstractmethod
    def take(self) -> tuple[int, bytes] | None:
        """Return a peer and its message if one waits."""

    @abstractmethod
    def wait(self) -> bool:
        """Sleep until one waits or the deadline has passed; return which."""

    @abstractmethod
    def close(self) -> None:
        """Close it."""


class Router(End):
    """A ROUTER for all workers."""

    def __init__(self, endpoint: str, count: int) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.bind(f"{endpoint}-0")
        self.poller = zmq.Poller()
        self.poller.register(self.socket, zmq.POLLIN)
        self.names = [b"%d" % number for number in range(count)]

    @override
    def send(self, peer: int, data: bytes) -> None:
        self.socket.send_multipart([self.names[peer], data], zmq.NOBLOCK)

    @override
    def take(self) -> tuple[int, bytes] | None:
        try:
            name, data = self.socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return int(name), data

    @override
    def wait(self) -> bool:
        return bool(self.poller.poll(round(DEADLINE * 1000)))

    @override
    def close(self) -> None:
        self.context.destroy(linger=0)


class Pairs(End):
    """A PAIR for each worker, under one poller."""

    def __init__(self, endpoint: str, count: int) -> None:
        self.context = zmq.Context()
        self.sockets = [self.context.socket(zmq.PAIR) for _ in range(count)]
        self.poller = zmq.Poller()
        for number, pair in enumerate(self.sockets):
            pair.bind(f"{endpoint}-{number}")
            self.poller.register(pair, zmq.POLLIN)

    @override
    def send(self, peer: int, data: bytes) -> None:
        self.sockets[peer].send(data, zmq.NOBLOCK)

    @override
    def take(self) -> tuple[int, bytes] | None:
        for pair, _ in self.poller.poll(0):
            return self.sockets.index(pair), pair.recv(zmq.NOBLOCK)
        return None

    @override
    def wait(self) -> bool:
        return bool(self.poller.poll(round(DEADLINE * 1000)))

    @override
    def close(self) -> None:
        self.context.destroy(linger=0)


class Dealer(End):
    """A worker's DEALER or PAIR."""

    def __init__(self, endpoint: str, number: int, kind: int) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(kind)
        self.socket.setsockopt(zmq.IDENTITY, b"%d" % number)
        self.socket.connect(f"{endpoint}-{number if kind == zmq.PAIR else 0}")

    @override
    def send(self, peer: int, data: bytes) -> None:
        self.socket.send(data, zmq.NOBLOCK)

    @override
    def take(self) -> tuple[int, bytes] | None:
        try:
            return 0, self.socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None

    @override
    def wait(self) -> bool:
        return bool(self.socket.poll(round(DEADLINE * 1000)))

    @override
    def close(self) -> None:
        self.context.destroy(linger=0)


class Sockets(End):
    """Socket pairs of the kernel's, no thread between: messages keep their bounds (SOCK_SEQPACKET)."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self.sockets = sockets
        self.numbers = {s.fileno(): number for number, s in enumerate(sockets)}
        self.poll = select.epoll()
        for s in sockets:
            s.setblocking(False)
            self.poll.register(s.fileno(), select.EPOLLIN)

    @override
    def send(self, peer: int, data: bytes) -> None:
        self.sockets[peer].send(data)

    @override
    def take(self) -> tuple[int, bytes] | None:
        for fd, _ in self.poll.poll(0, 1):
            return self.numbers[fd], self.sockets[self.numbers[fd]].recv(1 << 16)
        return None

    @override
    def wait(self) -> bool:
        return bool(self.poll.poll(DEADLINE, 1))

    @override
    def close(self) -> None:
        self.poll.close()
        for s in self.sockets:
            s.close()


class Chosen(Led):
    """Workers behind the chosen sockets."""

    name = "chosen"

    def __init__(self, work: Work, choice: Choice) -> None:
        super().__init__(work)
        self.choice = choice
        self.directory = tempfile.mkdtemp(prefix="drp-bench-")
        endpoint = f"ipc://{self.directory}/s"
        pairs: list[Any] = [None] * work.count
        if choice.pattern == "socketpair":
            pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(work.count)]
            self.end: End = Sockets([here for here, _ in pairs])
        else:
            self.end = (Router if choice.pattern == "router/dealer" else Pairs)(endpoint, work.count)
        spawn = multiprocessing.get_context("spawn")
        self.processes = [
            spawn.Process(
                target=answer,
                args=(work, choice, number, endpoint, pair[1] if pair else None, self.arena.bind),
                daemon=True,
            )
            for number, pair in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        for _ in self.processes:
            self.receive()  # every worker says once that it is there
        for pair in pairs:
            if pair:
                pair[1].close()

    def make_slots(self, slots: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Put them where the workers can map them."""
        self.arena = Arena.create(0, noise, slots, slots, {})
        return self.arena.drafts, self.arena.predictions

    def send(self, worker: int, task: Task) -> None:
        """Send a Draft."""
        self.end.send(worker, encode(Draft(0, task.index, task.timestep, task.slot, task.slot)))

    def receive(self) -> tuple[int, int, float]:
        """Receive a Prediction."""
        spin_until = time.perf_counter() + self.choice.spin if self.choice.spin else 0.0
        while (got := self.end.take()) is None:
            if time.perf_counter() >= spin_until and not self.end.wait():
                raise TimeoutError("no answer")
        worker, data = got
        message = decode(data, TO_LEADER)
        assert isinstance(message, Prediction)
        return worker, message.index, message.seconds

    def sample(self) -> Tensor:
        """Run once, this thread pinned to the last core if so chosen, with as many of torch's threads as chosen."""
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(cores)} if self.choice.pin_leader else cores)
        torch.set_num_threads(self.choice.threads)
        try:
            return super().sample()
        finally:
            os.sched_setaffinity(0, cores)
            torch.set_num_threads(1)

    def close(self) -> None:
        """Kill the workers: they hold nothing."""
        for process in self.processes:
            process.kill()
            process.join(DEADLINE)
        self.end.close()
        self.arena.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def answer(work: Work, choice: Choice, number: int, endpoint: str, pair: socket.socket | None, bind: Bind) -> None:
    """Evaluate until killed."""
    cores = os.sched_getaffinity(0)
    evaluator, arena = Evaluator(work, number), Arena.open(bind)
    if not choice.pin_workers:
        os.sched_setaffinity(0, cores)
    if pair is not None:
        end: End = Sockets([pair])
    else:
        end = Dealer(endpoint, number, zmq.DEALER if choice.pattern == "router/dealer" else zmq.PAIR)
    end.send(0, encode(Prediction(0, 0, 0, 0.0)))
    while True:
        while (got := end.take()) is None:
            end.wait()
        draft = decode(got[1], TO_WORKER)
        assert isinstance(draft, Draft)
        seconds = evaluator.evaluate(
            draft.index, draft.timestep, arena.drafts[draft.slot], arena.predictions[draft.slot]
        )
        end.send(0, encode(Prediction(0, draft.index, draft.row, seconds)))


@contextlib.contextmanager
def started(work: Work) -> Iterator[dict[str, Chosen]]:
    """Start the workers of every choice; choices that differ in the leader alone share theirs."""
    shared: dict[tuple[str, bool], Chosen] = {}
    try:
        for choice in CHOICES.values():
            key = (choice.pattern, choice.pin_workers)
            if key not in shared:
                shared[key] = Chosen(work, choice)
        yield {name: shared[choice.pattern, choice.pin_workers] for name, choice in CHOICES.items()}
    finally:
        for carrier in shared.values():
            carrier.close()


def measure(work: Work, turns: int = TURNS) -> dict[str, Any]:
    """Return the figures of every choice, its results checked against the reference."""
    runs: dict[str, list[RunTime]] = {name: [] for name in CHOICES}
    expected = work.reference()
    with started(work) as transports:
        for turn in range(turns + 1):
            for name, carrier in transports.items():
                carrier.choice = CHOICES[name]
                if not torch.equal(carrier.sample(), expected):
                    raise RuntimeError(f"{name} computes other samples than the reference")
                if turn:  # the first warms up
                    runs[name].append(split(carrier.timeline))
    return {name: summary(times, work.count) for name, times in runs.items()}


def main() -> None:
    """Measure eight emulated devices of 20 ms."""
    torch.set_num_threads(1)
    work = Work("emulated:20ms", 8)
    table = Table(
        *("", "lost, us: p50", "p95", "sending", "wire, wake-up: p50", "p95", "efficiency"),
        title=f"A round of {work.count} drafts, {work.count} x {work.device}, {len(os.sched_getaffinity(0))} cores",
    )
    for name, row in measure(work).items():
        keys = ("lost_p50", "lost_p95", "sending_p50", "wire_p50", "wire_p95")
        table.add_row(name, *(f"{row[key] * 1e6:.0f}" for key in keys), f"{row['efficiency_p50']:.3f}")
    console().print(table)


if __name__ == "__main__":
    main()
