"""The start-up handshake of workers, at the start and again after a loss."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from drp.errors import CudaError, WorkerError
from drp.leader.devices import Device
from drp.leader.memory.placement import MemoryPlacement
from drp.leader.supervision.worker_pool import WorkerPool, WorkerProcess
from drp.protocol.cuda import GpuMemory
from drp.protocol.memory import Memory, SharedMemory
from drp.protocol.messages import VERSION, Hello, Load, Loaded, Share, Shared, ToLeader, WarmedUp, WarmUp

log = logging.getLogger(__name__)


class SharedWeights:
    """One copy of the weights, in memory of the leader's, for those workers that can use it there."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.publisher: WorkerProcess | None = None
        self.published = False
        self.waiting: list[WorkerProcess] = []


class WorkerStartup:
    """What workers are told before their first draft: the model, and where its weights lie.

    There is one copy on the host for all workers there, and one on each GPU that has several workers. The first of them
    that has loaded the model copies its weights there; all use them from there. A GPU's only worker keeps its own, for
    a copy of the leader's would take a context of the leader's on that GPU. Those on GPUs then compile, capture and
    warm: the addresses must be final.
    """

    def __init__(self, pool: WorkerPool, model: str, devices: Sequence[Device], placement: MemoryPlacement) -> None:
        self._pool, self._model, self._placement = pool, model, placement
        self._workers = Counter(device.gpu for device in devices)
        self._expected: dict[bytes, type[ToLeader]] = {}
        self._loaded_model: Loaded | None = None
        self._first_worker = ""
        self._shared_weights: dict[str | None, SharedWeights | None] = {}
        """By GPU, None for the host; None where each worker keeps its own."""

    @property
    def loaded_model(self) -> Loaded:
        """What the model is, once a worker has loaded it."""
        assert self._loaded_model is not None
        return self._loaded_model

    def add_worker(self, worker: WorkerProcess) -> None:
        """Begin with a worker that was just started."""
        self._expected[worker.identity] = Hello

    def pending_step(self, worker: WorkerProcess) -> str:
        """Say what a worker has not done yet."""
        return {
            Hello: "start",
            Loaded: f"load {self._model!r} and start",
            Shared: "share its weights and start",
        }.get(self._expected[worker.identity], "compile, capture or warm its model and start")

    def blocked_by(self, worker: WorkerProcess) -> WorkerProcess | None:
        """Return the worker that another waits for, which has done all that it can."""
        copy = self._shared_weights.get(worker.device.gpu)
        return copy.publisher if copy is not None and worker in copy.waiting else None

    def on_message(self, worker: WorkerProcess, message: ToLeader) -> bool:
        """Take a worker's next word; return whether it is ready. Raise WorkerError for one that cannot be used."""
        due = self._expected.get(worker.identity)
        if due is None:
            raise WorkerError(f"{worker} sent {type(message).__name__}, which it does not owe")
        if not isinstance(message, due):
            raise WorkerError(f"{worker} sent {type(message).__name__} where {due.__name__} was due")
        match message:
            case Hello(version):
                if version != VERSION:
                    raise WorkerError(f"{worker} speaks version {version} of the protocol, the leader {VERSION}")
                load = Load(
                    self._model, worker.device.emulated, self._placement.worker_config(worker.number, worker.device)
                )
                self._send(worker, load, Loaded)
            case Loaded():
                self._on_loaded(worker, message)
            case Shared(unreached):
                self._on_shared(worker, unreached)
            case _:
                del self._expected[worker.identity]
        return worker.identity not in self._expected

    def remove_worker(self, worker: WorkerProcess) -> None:
        """Forget a worker that has ended; if it was copying the weights, another does."""
        self._expected.pop(worker.identity, None)
        copy = self._shared_weights.get(worker.device.gpu)
        if copy is None:
            return
        if worker in copy.waiting:
            copy.waiting.remove(worker)
        if worker == copy.publisher:
            copy.publisher = None
            self._share_on(copy)

    def close(self) -> None:
        """Give the weights' memory back; the workers must have ended."""
        for copy in self._shared_weights.values():
            if copy is not None:
                copy.memory.close()
        self._shared_weights.clear()

    def _on_loaded(self, worker: WorkerProcess, loaded: Loaded) -> None:
        """Have a worker bring or take the weights, or, where each has its own, go on."""
        if self._loaded_model is None:
            self._loaded_model, self._first_worker = loaded, str(worker)
        if loaded.layout != self._loaded_model.layout:
            raise WorkerError(
                f"{worker} made other weights of {self._model!r} than {self._first_worker}; its factory must not vary"
            )
        gpu = worker.device.gpu
        if gpu is not None and (
            why := self._placement.check_peer_access(worker.number, str(worker), loaded.probe_error)
        ):
            raise WorkerError(why)
        if gpu not in self._shared_weights:
            self._shared_weights[gpu] = self._create_shared_weights(gpu, loaded.nbytes)
        copy = self._shared_weights[gpu]
        if copy is None:
            self._continue(worker)
            return
        self._expected[worker.identity] = Shared
        copy.waiting.append(worker)
        self._share_on(copy)

    def _create_shared_weights(self, gpu: str | None, nbytes: int) -> SharedWeights | None:
        """Return a place for the weights; None where each worker had better keep its own."""
        if gpu is None:
            return SharedWeights(SharedMemory.create(nbytes))
        if self._workers[gpu] < 2 or not nbytes:
            return None
        try:
            return SharedWeights(GpuMemory.create(nbytes, gpu, GpuMemory.free))
        except (CudaError, MemoryError, RuntimeError) as error:
            self._warn(gpu, f"the leader cannot share {nbytes} bytes there: {error}")
            return None

    def _on_shared(self, worker: WorkerProcess, unreached: str) -> None:
        gpu = worker.device.gpu
        copy = self._shared_weights[gpu]
        assert copy is not None
        if worker == copy.publisher:
            copy.publisher = None
            if unreached:
                self._shared_weights[gpu] = None
                copy.memory.close()  # Nobody else was told of it.
                for other in copy.waiting:
                    self._continue(other)
            else:
                copy.published = True
                self._share_on(copy)
        if unreached:
            self._warn(gpu, f"{worker} cannot use the leader's memory there: {unreached}")
        self._continue(worker)

    def _share_on(self, copy: SharedWeights) -> None:
        """Let those that wait have the weights, or one of them bring them."""
        handle, gpu = copy.memory.ipc_handles
        if not copy.published and copy.publisher is None and copy.waiting:
            copy.publisher = copy.waiting.pop(0)
            self._send(copy.publisher, Share(handle, True, gpu), Shared)
        while copy.published and copy.waiting:
            self._send(copy.waiting.pop(0), Share(handle, False, gpu), Shared)

    def _continue(self, worker: WorkerProcess) -> None:
        """Have a worker whose weights are where they will stay do what is left."""
        if worker.device.gpu is None:
            del self._expected[worker.identity]
        else:
            self._send(worker, WarmUp(), WarmedUp)

    def _warn(self, gpu: str | None, why: str) -> None:
        log.warning("weights on %s are not shared by all its workers, and take memory once more each: %s", gpu, why)

    def _send(self, worker: WorkerProcess, message: Load | Share | WarmUp, due: type[ToLeader]) -> None:
        self._expected[worker.identity] = due
        self._pool.send(worker, message)
