"""Memory of runs that are over and its next use, in the leader."""

from __future__ import annotations

import os
import resource
import signal
import time

import pytest
import torch

import drp
from drp import Leader
from drp.protocol.buffer_pool import MAX_FREE_BUFFERS, BufferPool
from drp.protocol.memory import SharedMemory
from tests.conftest import leftovers

TINY = "tests.denoisers:Tiny"
PAGE = 4096


def test_what_was_closed_is_taken_again_if_it_is_about_as_long() -> None:
    spare = BufferPool()
    small, large = spare.acquire(PAGE), spare.acquire(10 * PAGE)
    small.close()
    large.close()
    assert spare.nbytes == 11 * PAGE
    assert spare.acquire(9 * PAGE) is large
    again = spare.acquire(2 * PAGE)
    assert again is not small  # too short
    assert spare.acquire(1) is small
    another = spare.acquire(1)
    assert another is not small
    assert spare.nbytes == 0
    spare.close()
    for memory in (small, large, again, another):
        memory.close()


def test_what_may_yet_be_written_to_is_not() -> None:
    spare = BufferPool()
    memory = spare.acquire(PAGE)
    memory.close(reuse=False)
    assert spare.nbytes == 0
    spare.close()


def test_no_more_is_kept_than_allowed_and_nothing_in_the_end() -> None:
    before, spare = leftovers(), BufferPool(max_nbytes=3 * PAGE)
    taken = [spare.acquire(PAGE) for _ in range(4)]
    for memory in taken:
        memory.close()
    assert spare.nbytes == 3 * PAGE
    again = spare.acquire(PAGE)
    assert again is not taken[0]  # what was given back first went first
    spare.acquire(4 * PAGE).close()
    assert spare.nbytes == 2 * PAGE
    late = spare.acquire(PAGE)
    spare.close()
    late.close()
    again.close()
    del taken, late, again, memory
    assert leftovers() == before


def test_few_pieces_are_kept_since_each_takes_descriptors() -> None:
    spare = BufferPool()
    taken = [spare.acquire(PAGE) for _ in range(MAX_FREE_BUFFERS + 3)]
    for memory in taken:
        memory.close()
    assert spare.nbytes == MAX_FREE_BUFFERS * PAGE
    spare.close()


def test_what_is_kept_is_given_back_when_descriptors_are_short() -> None:
    spare, before = BufferPool(), resource.getrlimit(resource.RLIMIT_NOFILE)
    for memory in [spare.acquire(PAGE) for _ in range(4)]:
        memory.close()
    held = [os.open("/dev/null", os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 1, before[1]))
    try:
        taken = [spare.acquire(20 * PAGE)]  # no longer piece is kept, and there is no descriptor for another
        assert spare.nbytes == 0
        with pytest.raises(MemoryError, match=r"shared memory: .*Too many open files"):
            taken.extend(spare.acquire(20 * PAGE) for _ in range(8))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        os.close(held[0])
    spare.close()
    for memory in taken:
        memory.close()


def test_runs_use_memory_again_and_have_their_own_bits(tiny: Leader) -> None:
    made = []
    create = SharedMemory.create

    def counted(nbytes: int, keep: object = None) -> SharedMemory:
        made.append(nbytes)
        return create(nbytes, keep)  # type: ignore[arg-type]  # it is passed on

    SharedMemory.create = counted  # type: ignore[method-assign]  # a spy
    try:
        for seed in range(5):
            for mode in ("aggressive", "conservative"):
                run = tiny.sample(labels=[1] * 6, steps=9, mode=mode, seed=seed)
                ref = drp.reference(TINY, labels=[1] * 6, steps=9, mode=mode, seed=seed, devices=2)
                assert torch.equal(run.samples, ref.samples)
    finally:
        SharedMemory.create = create  # type: ignore[method-assign]  # as it was
    assert len(made) <= 2


def test_memory_of_a_run_that_lost_a_worker_is_not_used_again() -> None:
    with Leader("tests.denoisers:make_slow_sine", devices=1) as leader:
        leader.sample(shape=(3,), steps=4)
        kept = leader.internals.placement.buffer_pool.free
        deadline = time.monotonic() + 60.0
        while not kept:  # which it is once all workers have opened it
            assert time.monotonic() < deadline
            time.sleep(0.005)
        [memory] = kept
        pending = leader.submit(shape=(3,), steps=40)  # in the same memory
        while pending.rounds < 2:
            time.sleep(0.005)
        pid = leader.workers[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert pending.result(60.0).incidents
        after = leader.sample(shape=(3,), steps=4)
        assert not after.incidents
        assert memory not in kept
