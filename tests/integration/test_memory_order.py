"""The order of writing and reading behind an arena, as a GPU needs it, tested where nothing is asynchronous.

The memory here is the host's, with one thing of a GPU's: what the leader has written reaches a worker only with
`written`. A leader that forgets to say so before a message has its workers compute from what was there before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch

import drp
from drp import Leader
from drp.errors import ProtocolError
from drp.protocol.arena import Arena
from drp.protocol.handles import GpuHandle, Handle
from drp.protocol.memory import Memory, SharedMemory
from tests.conftest import dispatching

HANDLE = GpuHandle("GPU-of-the-test", 1 << 16, bytes(64), bytes(64))
TINY = "tests.denoisers:Tiny"


class Late:
    """The workers have `theirs`, where predictions lie; drafts and conditions get there with `written`."""

    device, number = torch.device("cpu"), 0

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.mine, self.theirs = SharedMemory.create(nbytes), SharedMemory.create(nbytes)
        self.outputs = range(0)
        self.spans = 0

    @property
    def ipc_handles(self) -> tuple[Handle | None, GpuHandle | None]:
        return self.theirs.ipc_handles

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        self.spans += 1
        if self.spans != 2:  # An arena asks for its drafts, then its predictions, then its conditions.
            return self.mine.tensor(offset, shape, dtype)
        self.outputs = range(offset, offset + shape[0] * shape[1])
        return self.theirs.tensor(offset, shape, dtype)

    def record_event(self) -> None:
        for span in (slice(0, self.outputs.start), slice(self.outputs.stop, self.nbytes)):
            self.theirs.view()[span] = self.mine.view()[span]

    def wait_event(self) -> None:
        raise AssertionError("the owner does not follow itself")

    def close(self, reuse: bool = True) -> None:
        self.mine.close()
        self.theirs.close()


class Forgetful(Late):
    """Says nothing after the arena was bound, to all workers."""

    said, workers = 0, 2

    def record_event(self) -> None:
        self.said += 1
        if self.said <= self.workers:
            super().record_event()


@pytest.mark.parametrize(("workers", "batch"), [(2, 1), (1, 3)])
def test_the_leader_says_what_is_written_before_every_message_that_has_it_read(
    workers: int, batch: int, monkeypatch: pytest.MonkeyPatch, tiny: Leader
) -> None:
    monkeypatch.setattr(Forgetful, "workers", workers)
    own = nullcontext(tiny) if batch == 1 else Leader(TINY, devices=workers, drafts_per_device=batch)
    with own as leader, dispatching(leader, "sync"):  # Asynchronous runs are ordered by semaphores.
        for make, equal in ((Late, True), (Forgetful, False)):
            monkeypatch.setattr(leader.internals.placement, "allocate", make)
            for mode in ("conservative", "rolling"):
                run = leader.sample(labels=[1, 2], steps=12, mode=mode)
                ref = drp.reference(TINY, labels=[1, 2], steps=12, mode=mode, devices=workers, drafts_per_device=batch)
                assert torch.equal(run.samples, ref.samples) is equal, (make, mode)


def test_an_arena_names_a_gpus_memory_and_is_opened_by_its_handle() -> None:
    class Gpus(Late):
        @property
        def ipc_handles(self) -> tuple[Handle | None, GpuHandle | None]:
            return None, HANDLE

    made: list[Gpus] = []

    def make(nbytes: int) -> Memory:
        made.append(Gpus(nbytes))
        return made[0]

    arena = Arena.create(3, torch.zeros(2, 5), 4, 6, {"labels": torch.tensor([1, 2])}, make)
    assert made[0].nbytes == (4 + 6) * 256 + 256
    assert (arena.bind.memory, arena.bind.gpu) == (None, HANDLE)
    arena.drafts[1] = torch.arange(10.0)
    peer = Arena.open(arena.bind, lambda handle: made[0].theirs)
    assert not peer.drafts[1].any()  # written, but nobody has said so
    made[0].record_event()
    assert torch.equal(peer.drafts[1], torch.arange(10.0))
    assert torch.equal(peer.cond["labels"], torch.tensor([1, 2]))
    arena.close()


def test_host_memory_is_in_order_without_a_word() -> None:
    memory = SharedMemory.create(4096)
    assert memory.ipc_handles == (memory.handle, None)
    memory.record_event()
    memory.wait_event()
    memory.close()


def test_a_worker_without_a_gpu_refuses_a_gpus_memory() -> None:
    arena = Arena.create(0, torch.zeros(2, 5), 1, 1, {})
    for change in ({"memory": None, "gpu": HANDLE}, {"memory": None}, {"gpu": HANDLE}):
        with pytest.raises(ProtocolError, match="lies either in shared memory or"):
            Arena.open(dataclasses.replace(arena.bind, **change))
    arena.close()
