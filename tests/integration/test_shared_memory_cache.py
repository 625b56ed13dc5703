"""What a worker keeps of the leader's memory when a run is over."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import drp
from drp import Leader
from drp.errors import ProtocolError
from drp.leader.runs.run_state import InFlightBatch
from drp.leader.supervision.supervisor import WorkerSlot
from drp.protocol.memory import SharedMemory
from drp.protocol.messages import Bind, Rebind, ToWorker, Unbind
from drp.sampling.run import Task
from drp.workers.shared_memory_cache import MAX_ENTRIES, SharedMemoryCache
from tests.conftest import dispatching
from tests.waiting import until

PAGE = 4096
TINY = "tests.denoisers:Tiny"
DEADLINE = 30.0


def made(nbytes: int = PAGE) -> SharedMemory:
    memory = SharedMemory.create(nbytes, lambda memory: False)
    memory.tensor(0, (nbytes,), torch.uint8)
    return memory


def test_memory_that_comes_again_is_opened_once() -> None:
    mapped, memory = SharedMemoryCache(), made()
    assert memory.number
    first = mapped.open(memory.handle, memory.number)
    memory.view()[0] = 7
    memory.close()  # It cannot be opened any more, and need not be.
    again = mapped.open(memory.handle, memory.number)
    assert again is first
    assert again.tensor(0, (1,), torch.uint8).item() == 7
    first.close()


def test_other_memory_with_the_same_descriptor_is_told_by_its_number() -> None:
    """The kernel gives the lowest number that is free."""
    mapped, one = SharedMemoryCache(), made()
    handle = one.handle
    found = [mapped.open(handle, one.number)]
    one.close()
    other = made()
    assert other.handle == handle
    assert other.number != one.number
    found.append(mapped.open(other.handle, other.number))
    other.view()[0] = 9
    assert [memory.view()[0] for memory in found] == [0, 9]
    other.close()
    for memory in found:
        memory.close()


def test_no_more_is_kept_than_allowed_nor_what_does_not_come_again() -> None:
    small, many, memories = (
        SharedMemoryCache(max_nbytes=3 * PAGE),
        SharedMemoryCache(),
        [made() for _ in range(MAX_ENTRIES + 1)],
    )
    large, once = made(4 * PAGE), SharedMemory.create(PAGE)

    def find(mapped: SharedMemoryCache, memory: SharedMemory) -> SharedMemory:
        found = mapped.open(memory.handle, memory.number)
        found.close()  # as a worker does: the mapping stays
        return found

    for mapped, most in ((small, 3), (many, MAX_ENTRIES)):
        found = [find(mapped, memory) for memory in memories]
        newest = range(MAX_ENTRIES + 1 - most, MAX_ENTRIES + 1)
        assert all(find(mapped, memories[place]) is found[place] for place in newest)
        assert find(mapped, memories[0]) is not found[0]
    assert find(small, large) is not find(small, large)
    assert once.number == 0
    assert find(many, once) is not find(many, once)
    handle = large.handle
    for memory in (*memories, large, once):
        memory.close()
    with pytest.raises(ProtocolError, match="cannot be opened"):
        many.open(handle, large.number)


class Watched:
    """A leader, and what it tells its workers of runs: the message's name and the worker's number."""

    def __init__(self, leader: Leader) -> None:
        self.leader, self.told = leader, list[tuple[str, int]]()
        self._post = leader.internals.supervisor.enqueue
        leader.internals.supervisor.enqueue = self._watch  # type: ignore[method-assign]  # a spy

    def _watch(self, worker_slot: WorkerSlot[InFlightBatch], message: ToWorker) -> None:
        if isinstance(message, Bind | Rebind | Unbind):
            self.told.append((type(message).__name__, worker_slot.number))
        self._post(worker_slot, message)

    def run(self, **options: Any) -> torch.Tensor:
        """Return a run's samples once its memory is released."""
        samples = self.leader.sample(**options).samples
        self.settle()
        return samples

    def settle(self) -> None:
        until(lambda: not self.leader.internals.runs.draining)

    def names(self, worker: int = 0) -> list[str]:
        """Return how a worker's runs began."""
        return [name for name, number in self.told if name != "Unbind" and number == worker]


@pytest.fixture(scope="module")
def own() -> Iterator[Watched]:
    """Not the leader that all tests share: the memory that other runs left would be used instead of the last run's."""
    with Leader(TINY, devices=2) as leader:
        yield Watched(leader)


@pytest.fixture(params=["sync", "async"])
def watched(own: Watched, request: pytest.FixtureRequest) -> Iterator[Watched]:
    """One whose workers keep the memory of a run of another size than a test's."""
    with dispatching(own.leader, request.param):
        own.run(labels=[1] * 7, steps=3)
        own.told.clear()
        yield own


def test_a_worker_maps_the_memory_of_runs_once(watched: Watched) -> None:
    pids = [worker.pid for worker in watched.leader.workers]

    def maps() -> list[list[str]]:
        lines = [Path(f"/proc/{pid}/maps").read_text().splitlines() for pid in pids]
        return [[line.split()[0] for line in each if "memfd:drp-run" in line] for each in lines]

    watched.run(labels=[1], steps=6)
    once = maps()
    assert all(once)
    for _ in range(5):
        watched.run(labels=[1], steps=6)
    assert maps() == once


def test_a_run_like_the_last_one_begins_with_a_word(watched: Watched) -> None:
    for label in range(4):  # conditions are not what must be alike
        samples = watched.run(labels=[label], steps=9, seed=label)
        assert torch.equal(samples, drp.reference(TINY, labels=[label], steps=9, seed=label, devices=2).samples)
    assert [watched.told.count(("Bind", number)) for number in (0, 1)] == [1, 1]
    assert [watched.told.count(("Rebind", number)) for number in (0, 1)] == [3, 3]
    assert [watched.told.count(("Unbind", number)) for number in (0, 1)] == [4, 4]


def test_another_run_is_described_in_full(watched: Watched) -> None:
    for count, mode in ((1, "sequential"), (3, "sequential"), (3, "sequential"), (1, "sequential")):
        asked: dict[str, Any] = {"labels": [1] * count, "steps": 9, "mode": mode}
        assert torch.equal(watched.run(**asked), drp.reference(TINY, **asked, devices=2).samples)
    assert watched.names() == ["Bind", "Bind", "Rebind", "Bind"]


def test_of_several_runs_one_is_kept(watched: Watched) -> None:
    for turn in range(3):
        pending = [watched.leader.submit(labels=[label], steps=9, seed=turn) for label in range(3)]
        for label, run in enumerate(pending):
            ref = drp.reference(TINY, labels=[label], steps=9, seed=turn, devices=2)
            assert torch.equal(run.result(DEADLINE).samples, ref.samples)
        watched.settle()
    assert watched.names().count("Rebind") <= 2
    assert len(watched.names()) == 9


def test_memory_that_is_too_large_is_not_kept(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drp.leader.runs.run_table.MAX_RETAINED_NBYTES", PAGE)
    for _ in range(2):
        watched.run(labels=[1] * 8, steps=9, mode="sequential")
    assert watched.names() == ["Bind", "Bind"]


def test_a_callers_own_memory_is_described_each_time(watched: Watched) -> None:
    x = torch.randn(1, 1, 8, 8)
    for _ in range(2):
        session = watched.leader.open_session({"x": x}, {"x": x}, 2, {"labels": torch.tensor([1])})
        session.arena.draft(1)["x"].copy_(x)
        assert list(session.evaluate([Task(3, 250.0, 1)])) == [3]
        session.close()
        watched.settle()
    assert not [name for name, _ in watched.told if name == "Rebind"]


def test_nothing_is_left_to_a_lost_workers_successor(watched: Watched) -> None:
    leader = watched.leader
    samples = watched.run(labels=[1], steps=9)
    pid = leader.workers[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert leader.sample(labels=[1], steps=5).steps == 5  # by the other one
    until(lambda: leader.workers[0].pid not in (None, pid) and leader.workers[0].state == "ready")
    assert re.search(r"worker 0 .* was killed by SIGKILL", leader.workers[0].last_failure)
    watched.told.clear()
    assert torch.equal(watched.run(labels=[1], steps=9), samples)
    assert watched.names() == ["Bind"]
