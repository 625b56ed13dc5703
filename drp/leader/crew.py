"""Crew: brings workers to the point where they take drafts, at the start and again after a loss."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from drp.errors import WorkerError
from drp.leader.devices import Device
from drp.leader.ground import Ground
from drp.leader.pool import Pool, WorkerProcess
from drp.protocol.cuda import CudaError, GpuMemory
from drp.protocol.memory import Memory, SharedMemory
from drp.protocol.messages import VERSION, Hello, Load, Loaded, Share, Shared, ToLeader, Warm, Warmed

log = logging.getLogger(__name__)


class Copy:
    """One copy of the weights, in memory of the leader's, for those workers that can use it there."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.publisher: WorkerProcess | None = None
        self.published = False
        self.waiting: list[WorkerProcess] = []


class Crew:
    """What workers are told before their first draft: the model, and where its weights lie.

    There is one copy on the host for all workers there, and one on each GPU that has several workers. The first of them
    that has loaded the model copies its weights there; all use them from there. A GPU's only worker keeps its own, for
    a copy of the leader's would take a context of the leader's on that GPU. Those on GPUs then compile, capture and
    warm: the addresses must be final.
    """

    def __init__(self, pool: Pool, model: str, devices: Sequence[Device], ground: Ground) -> None:
        self._pool, self._model, self._ground = pool, model, ground
        self._workers = Counter(device.gpu for device in devices)
        self._due: dict[bytes, type[ToLeader]] = {}
        self._facts: Loaded | None = None
        self._first = ""
        self._copies: dict[str | None, Copy | None] = {}
        """By GPU, None for the host; None where each worker keeps its own."""

    @property
    def facts(self) -> Loaded:
        """What the model is, once a worker has loaded it."""
        assert self._facts is not None
        return self._facts

    def expect(self, worker: WorkerProcess) -> None:
        """Begin with a worker that was just started."""
        self._due[worker.identity] = Hello

    def doing(self, worker: WorkerProcess) -> str:
        """Say what a worker has not done yet."""
        return {
            Hello: "start",
            Loaded: f"load {self._model!r} and start",
            Shared: "share its weights and start",
        }.get(self._due[worker.identity], "compile, capture or warm its model and start")

    def held_up_by(self, worker: WorkerProcess) -> WorkerProcess | None:
        """Return the worker that another waits for, which has done all that it can."""
        copy = self._copies.get(worker.device.gpu)
        return copy.publisher if copy is not None and worker in copy.waiting else None

    def answer(self, worker: WorkerProcess, message: ToLeader) -> bool:
        """Take a worker's next word; return whether it is ready. Raise WorkerError for one that cannot be used."""
        due = self._due.get(worker.identity)
        if due is None:
            raise WorkerError(f"{worker} sent {type(message).__name__}, which it does not owe")
        if not isinstance(message, due):
            raise WorkerError(f"{worker} sent {type(message).__name__} where {due.__name__} was due")
        match message:
            case Hello(version):
                if version != VERSION:
                    raise WorkerError(f"{worker} speaks version {version} of the protocol, the leader {VERSION}")
                load = Load(self._model, worker.device.emulated, self._ground.how(worker.number, worker.device))
                self._tell(worker, load, Loaded)
            case Loaded():
                self._on_loaded(worker, message)
            case Shared(unreached):
                self._on_shared(worker, unreached)
            case _:
                del self._due[worker.identity]
        return worker.identity not in self._due

    def lose(self, worker: WorkerProcess) -> None:
        """Forget a worker that has ended; if it was copying the weights, another does."""
        self._due.pop(worker.identity, None)
        copy = self._copies.get(worker.device.gpu)
        if copy is None:
            return
        if worker in copy.waiting:
            copy.waiting.remove(worker)
        if worker == copy.publisher:
            copy.publisher = None
            self._share_on(copy)

    def close(self) -> None:
        """Give the weights' memory back; the workers must have ended."""
        for copy in self._copies.values():
            if copy is not None:
                copy.memory.close()
        self._copies.clear()

    def _on_loaded(self, worker: WorkerProcess, loaded: Loaded) -> None:
        """Have a worker bring or take the weights, or, where each has its own, go on."""
        if self._facts is None:
            self._facts, self._first = loaded, str(worker)
        if loaded.layout != self._facts.layout:
            raise WorkerError(
                f"{worker} made other weights of {self._model!r} than {self._first}; its factory must not vary"
            )
        gpu = worker.device.gpu
        if gpu is not None and (why := self._ground.judge(worker.number, str(worker), loaded.unreached)):
            raise WorkerError(why)
        if gpu not in self._copies:
            self._copies[gpu] = self._new_copy(gpu, loaded.nbytes)
        copy = self._copies[gpu]
        if copy is None:
            self._go_on(worker)
            return
        self._due[worker.identity] = Shared
        copy.waiting.append(worker)
        self._share_on(copy)

    def _new_copy(self, gpu: str | None, nbytes: int) -> Copy | None:
        """Return a place for the weights; None where each worker had better keep its own."""
        if gpu is None:
            return Copy(SharedMemory.create(nbytes))
        if self._workers[gpu] < 2 or not nbytes:
            return None
        try:
            return Copy(GpuMemory.create(nbytes, gpu, GpuMemory.free))
        except (CudaError, MemoryError, RuntimeError) as error:
            self._warn(gpu, f"the leader cannot share {nbytes} bytes there: {error}")
            return None

    def _on_shared(self, worker: WorkerProcess, unreached: str) -> None:
        gpu = worker.device.gpu
        copy = self._copies[gpu]
        assert copy is not None
        if worker == copy.publisher:
            copy.publisher = None
            if unreached:
                self._copies[gpu] = None
                copy.memory.close()  # Nobody else was told of it.
                for other in copy.waiting:
                    self._go_on(other)
            else:
                copy.published = True
                self._share_on(copy)
        if unreached:
            self._warn(gpu, f"{worker} cannot use the leader's memory there: {unreached}")
        self._go_on(worker)

    def _share_on(self, copy: Copy) -> None:
        """Let those that wait have the weights, or one of them bring them."""
        handle, gpu = copy.memory.names
        if not copy.published and copy.publisher is None and copy.waiting:
            copy.publisher = copy.waiting.pop(0)
            self._tell(copy.publisher, Share(handle, True, gpu), Shared)
        while copy.published and copy.waiting:
            self._tell(copy.waiting.pop(0), Share(handle, False, gpu), Shared)

    def _go_on(self, worker: WorkerProcess) -> None:
        """Have a worker whose weights are where they will stay do what is left."""
        if worker.device.gpu is None:
            del self._due[worker.identity]
        else:
            self._tell(worker, Warm(), Warmed)

    def _warn(self, gpu: str | None, why: str) -> None:
        log.warning("weights on %s are not shared by all its workers, and take memory once more each: %s", gpu, why)

    def _tell(self, worker: WorkerProcess, message: Load | Share | Warm, due: type[ToLeader]) -> None:
        self._due[worker.identity] = due
        self._pool.send(worker, message)
