"""Placement of runs: in host memory, or in the memory of the first worker's GPU, where the leader then computes."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Sequence

import torch

from drp.errors import CudaError
from drp.leader.devices import Device
from drp.leader.execution import ExecutionOptions
from drp.leader.memory.host_stream import CorePlacement, HostEvent, HostStream
from drp.protocol.buffer_pool import BufferPool
from drp.protocol.cuda import (
    MAX_COUNTERS,
    ArenaEvent,
    GpuCounters,
    GpuMemory,
    GpuStream,
    WorkerCounterView,
    is_inverted,
)
from drp.protocol.handles import GpuHandle
from drp.protocol.memory import Memory, SharedMemory
from drp.protocol.messages import GpuConfig
from drp.protocol.timeline import TIMELINE_NBYTES, LeaderOwnEvent, Stream, WorkerEvent
from drp.protocol.wakeup import WakeupReceiver

PROBE_NBYTES = 4096
MIN_BLOCK_NBYTES = 1 << 21
"""Bytes of the smallest block, which is the granularity of cudaMalloc."""

log = logging.getLogger(__name__)


class MemoryPlacement:
    """Allocates memory for runs and creates their streams and events.

    Placement starts on the GPU of the first device, if that is a GPU, and falls back to the host permanently as soon as
    a worker cannot access that GPU's memory. Blocks of GPU memory are reused and freed only in `close`, since workers
    keep the blocks that they have opened. `init_device` is called in the thread that computes.

        buffer_pool                             free memory on the host
        _uuid                                   the GPU on which runs are placed, None for the host
        _all, _free, _probes                    blocks of GPU memory: all, free ones, and by worker those of its probe
        _counters, _counters_by_worker,         blocks of counters for workers on GPUs; by worker, its current counter;
        _all_counters                           the counters of all workers that were ever started
        wakeup, core_placement                  how workers wake the leader, and whether it has a core of its own
        allows_async, nvtx, _options, _batch    from the options
    """

    def __init__(self, devices: Sequence[Device], options: ExecutionOptions, batch: int) -> None:
        where = {"auto": devices[0].gpu, "host": None}
        self._has_gpus = devices[0].gpu is not None
        self._uuid = where.get(options.memory, options.memory) if self._has_gpus else None
        self._gpus = [device.gpu for device in devices]
        self._lock = threading.Lock()
        self.shares_gpu_memory = self._has_gpus
        """Whether processes can share memory of a GPU by CUDA IPC, as far as is known."""
        self._options, self._batch = options, batch
        self.nvtx = options.nvtx and self._has_gpus
        self.buffer_pool = BufferPool()
        self._all: list[GpuMemory] = []
        self._free: list[GpuMemory] = []
        self._probes: dict[int, GpuMemory] = {}
        self.allows_async = options.allows_async
        """Whether runs may be dispatched asynchronously."""
        self.wakeup = WakeupReceiver() if self.allows_async else None
        """The descriptor by which workers wake the leader; None if all runs are dispatched synchronously."""
        cores = [core for device in devices for core in device.cores]
        self.core_placement: CorePlacement = "dedicated" if os.sched_getaffinity(0) - set(cores) else "shared"
        self._sequences = itertools.count()
        self._counters: list[GpuCounters] = []
        self._counters_by_worker: dict[int, WorkerCounterView] = {}
        self._all_counters: list[WorkerCounterView] = []
        """The counters of all workers that were ever started, in order."""
        self._pattern = (torch.arange(PROBE_NBYTES, device="cpu") % 251).to(torch.uint8)

    def init_device(self) -> None:
        """Make this thread compute on the GPU, on a separate stream; fall back to the host if that fails."""
        if self._uuid is None:
            return
        try:
            memory = self._create(MIN_BLOCK_NBYTES)
            torch.cuda.set_device(memory.device)
            torch.cuda.set_stream(torch.cuda.Stream(memory.device))  # type: ignore[no-untyped-call]  # torch has no types for it
            self._free.append(memory)
            self._init_counters()
        except (CudaError, MemoryError, RuntimeError) as error:
            self.shares_gpu_memory = False
            self._fall_back_to_host(f"the leader cannot share memory of {self._uuid}: {error}")

    def _init_counters(self) -> None:
        """Create counters for asynchronous runs. Without them, dispatch "auto" is synchronous."""
        if not self.allows_async:
            return
        try:
            self._counters.append(GpuCounters.create())
        except CudaError as error:  # For example, the driver is older than that of CUDA 11.7.
            if self._options.dispatch == "async":
                raise
            log.warning("runs are dispatched synchronously: %s", error)
            self.allows_async = False

    def worker_config(self, number: int, device: Device) -> GpuConfig | None:
        """Return the configuration of a worker's GPU, None without a GPU.

        It contains a probe if runs lie on the leader's GPU, whose memory the worker must be able to access.
        """
        if device.gpu is None:
            return None
        if self.allows_async and self._uuid is not None:
            # Each worker process gets new counters: waits for its predecessor's may still be queued.
            if number in self._counters_by_worker:
                # Repeat the release: the previous process may have written after it was lost.
                self._counters_by_worker[number].release()
            batch, index = divmod(len(self._all_counters), MAX_COUNTERS)
            if batch == len(self._counters):
                self._counters.append(GpuCounters.create())
            self._counters_by_worker[number] = WorkerCounterView(self._counters[batch], index)
            self._all_counters.append(self._counters_by_worker[number])
        return self._options.worker_config(device.gpu, self._batch, self._probe(number))

    def check_peer_access(self, number: int, worker: str, unreached: str) -> str:
        """Check what a worker wrote to its probe; return why the worker cannot be used, empty if it can.

        As long as no run lies on the GPU, a worker without access makes all runs fall back to the host instead.
        """
        if self._uuid is None or number not in self._probes:
            return ""
        if not unreached and is_inverted(self._probes[number], self._pattern):
            return ""
        if self._gpus[number] == self._uuid or self._uuid not in self._gpus:
            self.shares_gpu_memory = False  # Else that GPU may merely be no peer: a worker on this one shows it.
        why = f"{worker} cannot reach the memory of {self._uuid}: {unreached or 'what it wrote did not arrive'}"
        if len(self._all) > len(self._free) + len(self._probes):
            return why
        self._fall_back_to_host(why)
        return ""

    def allocate(self, nbytes: int) -> Memory:
        """Return memory for a run, of at least `nbytes` bytes. Closing it makes it available again."""
        if self._uuid is None:
            return self.buffer_pool.acquire(nbytes)
        size = max(MIN_BLOCK_NBYTES, 1 << (nbytes - 1).bit_length())
        with self._lock:
            memory = next((each for each in self._free if each.nbytes == size), None)
            if memory is not None:
                self._free.remove(memory)
        return memory or self._create(size)

    def allocate_for_caller(self, nbytes: int) -> Memory:
        """Return memory for a session, whose caller computes in another thread and on another stream.

        What that stream does from now on waits for what the last session read of the same memory.
        """
        if self._uuid is None:
            return SharedMemory.create(nbytes)
        memory = self.allocate(nbytes)
        with torch.cuda.device(memory.device) if memory.device.type == "cuda" else contextlib.nullcontext():
            memory.wait_event()
        return memory

    def free_unused(self) -> None:
        """Free the host memory kept for future runs, when memory or descriptors are needed elsewhere."""
        self.buffer_pool.clear()

    @property
    def on_gpu(self) -> bool:
        """Whether runs lie on a GPU, whose streams execute by themselves and must be polled."""
        return self._uuid is not None

    @property
    def workers_acknowledge(self) -> bool:
        """Whether workers send a message once a draft is queued.

        Workers on GPUs do, because queuing may fail there, and because CUDA events have no numbers to wait for.
        """
        return self._has_gpus

    def next_sequence(self) -> int:
        """Return a sequence number for a draft. Numbers repeat after 2**32 - 1 drafts and are never 0."""
        return 1 + next(self._sequences) % (2**32 - 1)

    def allocate_ordered(self, nbytes: int) -> Memory:
        """Allocate memory for a run with its own stream, which is ordered after the previous run in that memory."""
        memory = self.allocate(nbytes)
        memory.wait_event()
        return memory

    def new_stream(self) -> Stream:
        """Return a new stream for one run; the caller closes it with the run."""
        if self._uuid is None:
            return HostStream(self.core_placement)
        return GpuStream(torch.device("cuda", torch.cuda.current_device()))

    def leader_event(self, memory: Memory, place: int, stream: Stream) -> LeaderOwnEvent:
        """Return the leader's event of a run. On the host, its semaphore is at byte `place` of the run's memory."""
        if isinstance(stream, HostStream):
            return HostEvent(memory.tensor(place, (TIMELINE_NBYTES // 8,), torch.int64), stream)
        return ArenaEvent(memory)

    def worker_event(self, number: int, memory: Memory, place: int, stream: Stream) -> WorkerEvent:
        """Return a worker's event of a run. On a GPU, a worker has one event for all runs.

        On the host, the event's semaphore is at byte `place` of the run's memory.
        """
        if isinstance(stream, HostStream):
            return HostEvent(
                memory.tensor(place, (TIMELINE_NBYTES // 8,), torch.int64), stream, notifies=not self._has_gpus
            )
        return self._counters_by_worker[number]

    def close(self) -> None:
        """Free all memory; the workers must have ended."""
        for view in self._all_counters:
            view.release()  # Waits for the workers' events may still be queued, and freeing memory waits for them.
        self.buffer_pool.close()
        if self.wakeup is not None:
            self.wakeup.close()
        for memory in self._all:
            memory.free()
        self._all.clear()
        self._free.clear()
        self._probes.clear()
        for counters in self._counters:
            counters.free()
        self._counters.clear()

    def _create(self, nbytes: int) -> GpuMemory:
        assert self._uuid is not None
        memory = GpuMemory.create(nbytes, self._uuid, self._free.append)
        self._all.append(memory)
        return memory

    def _probe(self, number: int) -> GpuHandle | None:
        if self._uuid is None:
            return None
        if number not in self._probes:
            self._probes[number] = self._create(PROBE_NBYTES)
        memory = self._probes[number]
        memory.tensor(0, (PROBE_NBYTES,), torch.uint8).copy_(self._pattern)
        memory.record_event()
        return memory.ipc_handles[1]

    def _fall_back_to_host(self, why: str) -> None:
        log.warning("runs will lie on the host, and be copied to the GPUs through pinned memory: %s", why)
        self._uuid = None
