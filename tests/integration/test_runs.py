"""Several runs at once on one leader, and runs that nobody wants any more."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import threading
from collections import deque
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from drp import Leader
from drp.leader.scheduling.policies import Barrier, LoadAdaptive, RunAffinity
from tests.conftest import dispatching
from tests.waiting import until

DEADLINE = 30.0
ASKED: list[dict[str, Any]] = [
    {"labels": list(range(1 + seed % 3)), "steps": steps, "mode": mode, "drafts": drafts, "seed": seed}
    for seed, (mode, drafts, steps) in enumerate(
        itertools.product(("conservative", "aggressive", "adaptive"), (1, 2, 5), (7, 12))
    )
]


def test_runs_at_the_same_time_have_the_bits_they_have_alone(tiny: Leader) -> None:
    alone = [tiny.sample(**asked).samples for asked in ASKED]
    before = tiny.policy
    for policy in (Barrier(), RunAffinity(), LoadAdaptive()):
        tiny.policy = policy
        together = [tiny.submit(**asked) for asked in ASKED]
        for pending, samples in zip(together, alone, strict=True):
            assert torch.equal(pending.result(DEADLINE).samples, samples), policy
    tiny.policy = before


def test_a_run_that_is_cancelled_ends_within_a_round(free: Leader) -> None:
    slow: dict[str, Any] = {"shape": (4,), "drafts": 1, "cond": {"seconds": torch.tensor(0.05)}}
    reached, seen = threading.Event(), list[int]()

    def watch(k: int, x: Tensor) -> None:
        seen.append(k)
        if k == 3:
            reached.set()

    free.timeline = []
    pending = free.submit(**slow, steps=500, callback=watch)
    assert reached.wait(DEADLINE)
    sent = sum(mark.kind == "sent" for mark in free.timeline)
    assert pending.cancel()
    with pytest.raises(CancelledError):
        pending.result(DEADLINE)
    assert sum(mark.kind == "sent" for mark in free.timeline) <= sent + 2
    until(lambda: not free.internals.runs.draining)  # the workers answered, and let go of its memory
    assert free.sample(**slow, steps=3).evaluations == 3
    assert len(seen) < 20


def test_more_runs_than_there_is_room_for_wait_their_turn(tiny: Leader) -> None:
    alone = tiny.sample(labels=[1], steps=9).samples
    at_once: list[int] = []
    runs = [
        tiny.submit(labels=[1], steps=9, callback=lambda k, x: at_once.append(len(tiny.internals.runs.running)))
        for _ in range(60)
    ]
    runs[50].cancel()
    for place, run in enumerate(runs):
        if place == 50:
            with pytest.raises(CancelledError):
                run.result(DEADLINE)
        else:
            assert torch.equal(run.result(DEADLINE).samples, alone)
    assert 2 < max(at_once) <= 8


def test_workers_that_a_run_cannot_use_yet_evaluate_another_run(free: Leader) -> None:
    """The first run's fourth round depends on its third, a lone evaluation, and would occupy the other worker."""
    free.policy = Barrier()  # The oldest run goes first.
    gate, opener = os.pipe()
    begun, both = threading.Event(), threading.Event()

    def hold(k: int, x: Tensor) -> None:
        begun.set()
        assert both.wait(DEADLINE)

    asked: dict[str, Any] = {"shape": (4,), "steps": 8, "mode": "conservative", "drafts": 2}
    alone = free.sample(**asked)
    free.submit(shape=(4,), steps=2, callback=hold)  # The leader's thread admits the two others together.
    try:
        assert begun.wait(DEADLINE)
        first = free.submit(**asked, cond={"gate": torch.tensor([os.getpid(), gate])})
        second = free.submit(**asked)
        both.set()
        assert torch.equal(second.result(DEADLINE).samples, alone.samples)
        assert not first.done()
    finally:
        both.set()
        os.close(opener)
    assert torch.equal(first.result(DEADLINE).samples, alone.samples)
    os.close(gate)


def test_cancelling_one_run_leaves_the_others(tiny: Leader) -> None:
    alone = tiny.sample(labels=[1], steps=40).samples
    kept, unwanted = tiny.submit(labels=[1], steps=40), tiny.submit(labels=[2], steps=1000)
    unwanted.cancel()
    assert torch.equal(kept.result(DEADLINE).samples, alone)
    with pytest.raises(CancelledError):
        unwanted.result(DEADLINE)
    assert not kept.cancel()
    assert torch.equal(kept.result().samples, alone)


def test_a_callback_that_raises_ends_its_own_run_alone(tiny: Leader) -> None:
    def fail(k: int, x: Tensor) -> None:
        raise LookupError("not here")

    alone = tiny.sample(labels=[1], steps=40).samples
    bad, good = tiny.submit(labels=[1], steps=40, callback=fail), tiny.submit(labels=[1], steps=40)
    with pytest.raises(LookupError, match="not here"):
        bad.result(DEADLINE)
    assert torch.equal(good.result(DEADLINE).samples, alone)


def test_closing_cancels_what_is_under_way_and_lets_workers_take_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAREWELL", str(tmp_path))
    leader = Leader("tests.denoisers:make_slow", devices=2)
    workers = {str(worker.pid) for worker in leader.workers}
    done = leader.submit(shape=(4,), steps=1)
    done.result(DEADLINE)
    pending = [leader.submit(shape=(4,), steps=500) for _ in range(3)]
    leader.close()
    assert {path.name for path in tmp_path.iterdir()} == workers
    # These take the numbers that are free now; a late cancel writes to nobody else's file.
    files = [(tmp_path / f"file {i}").open("wb", buffering=0) for i in range(50)]
    for each in pending:
        with pytest.raises(CancelledError):
            each.result(DEADLINE)
    assert not any(each.cancel() for each in (done, *pending))
    for file in files:
        file.close()
    assert all((tmp_path / f"file {i}").stat().st_size == 0 for i in range(50))


def test_a_pending_run_can_be_awaited(tiny: Leader) -> None:
    async def both() -> list[Tensor]:
        runs = [asyncio.wrap_future(tiny.submit(labels=[1], steps=9)) for _ in range(2)]
        return [(await run).samples for run in runs]

    first, second = asyncio.run(asyncio.wait_for(both(), DEADLINE))
    assert torch.equal(first, second)


class Waiting:
    """What a policy looks at of a run."""

    def __init__(self, drafts: int) -> None:
        self.waiting = deque(range(drafts))


def test_sharing_by_load() -> None:
    old, young, idle = Waiting(2), Waiting(2), Waiting(0)
    policy: Any = LoadAdaptive()
    assert policy.choose(0, 4, [old, young]) is policy.choose(1, 4, [old, young]) is old
    assert policy.choose(1, 4, [idle, young]) is young
    assert policy.choose(0, 2, [old, young]) is old
    assert policy.choose(1, 2, [old, young]) is young
    assert policy.choose(1, 2, [old, idle]) is old
    assert policy.choose(0, 2, [idle, idle]) is None


@pytest.mark.parametrize("dispatch", ["sync", "async"])
def test_a_thousand_rounds_gain_no_memory_and_no_descriptor(dispatch: str, tiny: Leader) -> None:
    with dispatching(tiny, dispatch) as leader:
        everyone = [psutil.Process(), *(psutil.Process(worker.pid) for worker in leader.workers)]

        def use() -> list[tuple[int, int]]:
            gc.collect()  # what other tests left, errors with their tracebacks above all
            return [
                (process.num_fds(), len(Path(f"/proc/{process.pid}/maps").read_text().splitlines()))
                for process in everyone
            ]

        def rounds(count: int) -> None:
            done = 0
            while done < count:
                done += leader.sample(labels=[1], steps=200, mode="sequential").rounds

        rounds(400)
        until(lambda: not leader.internals.runs.draining)
        before, resident = use(), [process.memory_info().rss for process in everyone]
        rounds(1000)
        until(lambda: not leader.internals.runs.draining)

        def gained() -> list[tuple[int, int]]:
            return [(fds - fds0, maps - maps0) for (fds, maps), (fds0, maps0) in zip(use(), before, strict=True)]

        until(lambda: all(fds <= 0 and maps <= 5 for fds, maps in gained()))  # workers let go of the last run later
        for process, rss in zip(everyone, resident, strict=True):
            assert process.memory_info().rss < rss + 4_000_000
