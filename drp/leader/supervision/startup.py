"""The start-up handshake of workers, at the start and again after a loss."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from drp.errors import CudaError, WorkerError
from drp.leader.devices import Device
from drp.leader.memory.placement import MemoryPlacement
from drp.leader.supervision.worker import WorkerHandle
from drp.leader.supervision.worker_pool import WorkerPool
from drp.protocol.cuda import GpuMemory
from drp.protocol.memory import Memory, SharedMemory
from drp.protocol.messages import VERSION, Hello, Load, Loaded, Share, Shared, ToLeader, WarmedUp, WarmUp

log = logging.getLogger(__name__)


class SharedWeights:
    """A copy of the weights in the leader's memory, shared by the workers that can access it.

    `publisher` is the worker that is copying its weights there. `waiting` are workers that have loaded the model and
    wait until the copy is `published`.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.publisher: WorkerHandle | None = None
        self.published = False
        self.waiting: list[WorkerHandle] = []


class WorkerStartup:
    """The handshake of a worker before its first draft: loading the model and sharing its weights.

        leader sends  worker answers  workers
        -             Hello           all
        Load          Loaded          all
        Share         Shared          those that use a shared copy of the weights
        WarmUp        WarmedUp        those on GPUs

    There is one copy of the weights on the host for all workers on cores, and one on each GPU that has several workers.
    The first of these workers to load the model copies its weights there, and all of them use the copy. A GPU's only
    worker keeps its own weights, since a shared copy would need a CUDA context of the leader on that GPU. Workers on
    GPUs compile, capture and warm up last, because the addresses of the weights must be final. A worker on another
    machine loads and keeps its own weights, whose digest must be that of all others.
    """

    def __init__(self, pool: WorkerPool, model: str, devices: Sequence[Device], placement: MemoryPlacement) -> None:
        self._pool, self._model, self._placement = pool, model, placement
        self._workers = Counter(device.gpu for device in devices)
        self._digests = any(device.remote is not None for device in devices)
        """Whether workers report a digest of their weights, since those on other machines load their own files."""
        self._expected: dict[bytes, type[ToLeader]] = {}
        self._loaded_model: Loaded | None = None
        self._first_worker = ""
        self._shared_weights: dict[str | None, SharedWeights | None] = {}
        """By GPU, with the key None for the host; the value is None where each worker keeps its own weights."""

    @property
    def loaded_model(self) -> Loaded:
        """The description of the model, once a worker has loaded it."""
        assert self._loaded_model is not None
        return self._loaded_model

    def add_worker(self, worker: WorkerHandle) -> None:
        """Begin the handshake with a worker that was just started."""
        self._expected[worker.identity] = Hello

    def pending_step(self, worker: WorkerHandle) -> str:
        """Describe the step that a worker has not completed."""
        return {
            Hello: "start",
            Loaded: f"load {self._model!r} and start",
            Shared: "share its weights and start",
        }.get(self._expected[worker.identity], "compile, capture or warm its model and start")

    def blocked_by(self, worker: WorkerHandle) -> WorkerHandle | None:
        """Return the worker whose copy of the weights another worker waits for, None if it does not wait."""
        copy = self._shared_weights.get(worker.device.gpu)
        return copy.publisher if copy is not None and worker in copy.waiting else None

    def on_message(self, worker: WorkerHandle, message: ToLeader) -> bool:
        """Handle a worker's message; return whether the worker is ready. Raises WorkerError if it cannot be used."""
        due = self._expected.get(worker.identity)
        if due is None:
            raise WorkerError(f"{worker} sent an unexpected {type(message).__name__}")
        if not isinstance(message, due):
            raise WorkerError(f"{worker} sent {type(message).__name__} instead of {due.__name__}")
        match message:
            case Hello(version):
                if version != VERSION:
                    raise WorkerError(f"{worker} speaks version {version} of the protocol, the leader {VERSION}")
                config = self._placement.worker_config(worker.number, worker.device)
                self._send(worker, Load(self._model, worker.device.emulated, config, self._digests), Loaded)
            case Loaded():
                self._on_loaded(worker, message)
            case Shared(unreached):
                self._on_shared(worker, unreached)
            case _:
                del self._expected[worker.identity]
        return worker.identity not in self._expected

    def remove_worker(self, worker: WorkerHandle) -> None:
        """Remove a worker that has ended. If it was copying its weights, another worker does so instead."""
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
        """Free the weights' memory; the workers must have ended."""
        for copy in self._shared_weights.values():
            if copy is not None:
                copy.memory.close()
        self._shared_weights.clear()

    def _on_loaded(self, worker: WorkerHandle, loaded: Loaded) -> None:
        """Have a worker share or use the weights, or continue where each worker keeps its own."""
        if self._loaded_model is None:
            self._loaded_model, self._first_worker = loaded, str(worker)
        if loaded.layout != self._loaded_model.layout:
            raise WorkerError(
                f"{worker} made other weights of {self._model!r} than {self._first_worker}; its factory must not vary"
            )
        if loaded.digest != self._loaded_model.digest:
            raise WorkerError(
                f"{worker} has other weights of {self._model!r} than {self._first_worker}: their digests are "
                f"{loaded.digest} and {self._loaded_model.digest}; give both machines the same files"
            )
        if not worker.shares_memory:
            self._continue(worker)
            return
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
        """Allocate memory for the weights; return None where each worker keeps its own."""
        if gpu is None:
            return SharedWeights(SharedMemory.create(nbytes))
        if self._workers[gpu] < 2 or not nbytes:
            return None
        try:
            return SharedWeights(GpuMemory.create(nbytes, gpu, GpuMemory.free))
        except (CudaError, MemoryError, RuntimeError) as error:
            self._warn(gpu, f"the leader cannot share {nbytes} bytes there: {error}")
            return None

    def _on_shared(self, worker: WorkerHandle, unreached: str) -> None:
        gpu = worker.device.gpu
        copy = self._shared_weights[gpu]
        assert copy is not None
        if worker == copy.publisher:
            copy.publisher = None
            if unreached:
                self._shared_weights[gpu] = None
                copy.memory.close()  # No other worker knows this memory yet.
                for other in copy.waiting:
                    self._continue(other)
            else:
                copy.published = True
                self._share_on(copy)
        if unreached:
            self._warn(gpu, f"{worker} cannot use the leader's memory there: {unreached}")
        self._continue(worker)

    def _share_on(self, copy: SharedWeights) -> None:
        """Have the waiting workers use the published copy, or one of them publish it."""
        handle, gpu = copy.memory.ipc_handles
        if not copy.published and copy.publisher is None and copy.waiting:
            copy.publisher = copy.waiting.pop(0)
            self._send(copy.publisher, Share(handle, True, gpu), Shared)
        while copy.published and copy.waiting:
            self._send(copy.waiting.pop(0), Share(handle, False, gpu), Shared)

    def _continue(self, worker: WorkerHandle) -> None:
        """Continue with a worker whose weights are at their final address: warm up on a GPU, else finish."""
        if worker.device.gpu is None:
            del self._expected[worker.identity]
        else:
            self._send(worker, WarmUp(), WarmedUp)

    def _warn(self, gpu: str | None, why: str) -> None:
        log.warning("weights on %s are not shared by all its workers, and take memory once more each: %s", gpu, why)

    def _send(self, worker: WorkerHandle, message: Load | Share | WarmUp, due: type[ToLeader]) -> None:
        self._expected[worker.identity] = due
        worker.send(worker.encode(message))
