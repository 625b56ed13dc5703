"""Memory placement: where runs are computed and stored, on the host or on the first worker's GPU."""

from __future__ import annotations

import itertools
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drp.errors import CudaError
from drp.leader.devices import Device
from drp.leader.memory.buffer_pool import BufferPool
from drp.leader.memory.host_stream import CorePlacement, HostEvent, HostStream
from drp.protocol.cuda import (
    MAX_COUNTERS,
    ArenaEvent,
    GpuCounters,
    GpuMemory,
    GpuStream,
    WorkerCounterView,
    is_inverted,
)
from drp.protocol.memory import Memory
from drp.protocol.messages import GpuConfig, GpuHandle, Half
from drp.protocol.timeline import TIMELINE_NBYTES, LeaderOwnEvent, Stream, WorkerEvent
from drp.protocol.wakeup import WakeupReceiver

PROBE_NBYTES = 4096
ORDERED = ("x86_64", "AMD64")
"""Processors whose stores are seen in the order in which they were made, as `drp.protocol.timeline` needs it."""
MIN_BLOCK_NBYTES = 1 << 21
"""Bytes of the smallest block; cudaMalloc gives no less."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuOptions:
    """How workers use their GPUs: see docs/gpus.md.

    dtype: of the weights and of what they are applied to, "float16" or "bfloat16"; by default the model's own. States
        and predictions stay float32.
    compile: send the model through torch.compile.
    graphs: capture its evaluations as CUDA graphs, one for each shape.
    nvtx: name what leader and workers do in ranges, for Nsight Systems.
    memory: "auto": runs lie in the memory of the first worker's GPU if all workers can reach it, else on the host.
        "host": on the host, in any case: workers copy drafts to their GPU and predictions back.
    dispatch: "sync": a worker waits for its GPU before it answers. "async": it answers at once, and waits are queued
        on the GPUs; stamps prove what was read, see docs/gpus.md. Workers on cores do the same with threads, and do not
        even answer. Not with `hedge`.
    """

    dtype: Half | None = None
    compile: bool = False
    graphs: bool = False
    memory: str = "auto"
    dispatch: str = "sync"
    nvtx: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float16", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; give 'bfloat16', 'float16', or None for the model's own")
        if self.memory not in ("auto", "host"):
            raise ValueError(f"memory is {self.memory!r}; give 'auto' or 'host'")
        if self.dispatch not in ("sync", "async"):
            raise ValueError(f"dispatch is {self.dispatch!r}; give 'sync' or 'async'")
        if self.dispatch == "async" and (machine := platform.machine()) not in ORDERED:
            raise ValueError(
                f"dispatch is 'async', but the processor is {machine}: processes then tell each other by plain stores "
                "to shared memory, which other processors than x86-64 may reorder; give 'host'"
            )

    def worker_config(self, uuid: str, batch: int, probe: GpuHandle | None = None) -> GpuConfig:
        """Return what a worker on this GPU is told."""
        return GpuConfig(uuid, self.dtype, self.compile, self.graphs, batch, probe, self.nvtx)


class MemoryPlacement:
    """Memory for runs, lent as often as it is asked for and freed at the end: workers keep what they have opened.

    It begins on the GPU of the first device, if that is one, and moves to the host for good as soon as a worker cannot
    reach it. `enter` is called in the thread that computes.
    """

    def __init__(self, devices: Sequence[Device], options: GpuOptions, batch: int) -> None:
        self._uuid = devices[0].gpu if options.memory == "auto" else None
        self._options, self._batch = options, batch
        self._has_gpus = devices[0].gpu is not None
        self.nvtx = options.nvtx and self._has_gpus
        self._buffer_pool = BufferPool()
        self._all: list[GpuMemory] = []
        self._free: list[GpuMemory] = []
        self._probes: dict[int, GpuMemory] = {}
        self.asynchronous = options.dispatch == "async"
        """Whether answers run ahead of the devices."""
        self.wakeup = WakeupReceiver() if self.asynchronous else None
        """With which workers wake the leader."""
        cores = [core for device in devices for core in device.cores]
        self._core_placement: CorePlacement = "dedicated" if os.sched_getaffinity(0) - set(cores) else "shared"
        self._sequences = itertools.count()
        self._counters: list[GpuCounters] = []
        self._counters_by_worker: dict[int, WorkerCounterView] = {}
        self._all_counters: list[WorkerCounterView] = []
        """Of all workers that were ever started, in order."""
        self._pattern = (torch.arange(PROBE_NBYTES, device="cpu") % 251).to(torch.uint8)

    def init_device(self) -> None:
        """Compute on the GPU, in a stream of its own, from here on in this thread; or on the host, if that fails."""
        if self._uuid is None:
            return
        try:
            memory = self._create(MIN_BLOCK_NBYTES)
            torch.cuda.set_device(memory.device)
            torch.cuda.set_stream(torch.cuda.Stream(memory.device))  # type: ignore[no-untyped-call]  # torch has no types for it
            self._free.append(memory)
            if self.asynchronous:
                self._counters.append(GpuCounters.create())
        except (CudaError, MemoryError, RuntimeError) as error:
            self._fall_back_to_host(f"the leader cannot share memory of {self._uuid}: {error}")

    def worker_config(self, number: int, device: Device) -> GpuConfig | None:
        """Return what a worker is told of its GPU, None without one; with a probe, if it has to reach the leader's."""
        if device.gpu is None:
            return None
        if (
            self.asynchronous and self._uuid is not None
        ):  # another for each worker: there may yet be waits for the last one's
            if number in self._counters_by_worker:
                self._counters_by_worker[
                    number
                ].release()  # Once more: one that took its time may have written since it was lost.
            batch, line = divmod(len(self._all_counters), MAX_COUNTERS)
            if batch == len(self._counters):
                self._counters.append(GpuCounters.create())
            self._counters_by_worker[number] = WorkerCounterView(self._counters[batch], line)
            self._all_counters.append(self._counters_by_worker[number])
        return self._options.worker_config(device.gpu, self._batch, self._probe(number))

    def check_peer_access(self, number: int, worker: str, unreached: str) -> str:
        """Look at what a worker has made of its probe; return why it cannot be used, empty if it can.

        As long as no run lies on the GPU there is a remedy: they all go to the host.
        """
        if self._uuid is None or number not in self._probes:
            return ""
        if not unreached and is_inverted(self._probes[number], self._pattern):
            return ""
        why = f"{worker} cannot reach the memory of {self._uuid}: {unreached or 'what it wrote did not arrive'}"
        if len(self._all) > len(self._free) + len(self._probes):
            return why
        self._fall_back_to_host(why)
        return ""

    def allocate(self, nbytes: int) -> Memory:
        """Return memory for a run, at least so long; closing it gives it back."""
        if self._uuid is None:
            return self._buffer_pool.acquire(nbytes)
        size = max(MIN_BLOCK_NBYTES, 1 << (nbytes - 1).bit_length())
        memory = next((each for each in self._free if each.nbytes == size), None)
        if memory is None:
            return self._create(size)
        self._free.remove(memory)
        return memory

    def free_unused(self) -> None:
        """Give back what is kept on the host for runs to come: something else is short of memory or descriptors."""
        self._buffer_pool.clear()

    def drain_wakeups(self) -> None:
        """Reset the descriptor by which workers wake the leader, if there is one."""
        if self.wakeup is not None:
            self.wakeup.drain()

    @property
    def on_gpu(self) -> bool:
        """Whether runs lie on a GPU: its streams go on by themselves, and have to be looked at."""
        return self._uuid is not None

    @property
    def workers_acknowledge(self) -> bool:
        """Whether workers say that a draft is queued: GPUs may fail at that, and their events have no numbers."""
        return self._has_gpus

    def next_sequence(self) -> int:
        """Return a sequence number for a draft, which none of the last four billion has."""
        return 1 + next(self._sequences) % (2**32 - 1)

    def allocate_ordered(self, nbytes: int) -> Memory:
        """Do as `make` does, for a run with a stream of its own: it comes after the run that had the memory before."""
        memory = self.allocate(nbytes)
        memory.wait_event()
        return memory

    def new_stream(self) -> Stream:
        """Return a stream for one run, to be closed with it."""
        if self._uuid is None:
            return HostStream(self._core_placement)
        return GpuStream(torch.device("cuda", torch.cuda.current_device()))

    def leader_event(self, memory: Memory, place: int, stream: Stream) -> LeaderOwnEvent:
        """Return what the leader records of a run; on the host its numbers are at this place of the run's memory."""
        if isinstance(stream, HostStream):
            return HostEvent(memory.tensor(place, (TIMELINE_NBYTES // 8,), torch.int64), stream)
        return ArenaEvent(memory)

    def worker_event(self, number: int, memory: Memory, place: int, stream: Stream) -> WorkerEvent:
        """Return what a worker records of a run: on a GPU of all, and on the host as above."""
        if isinstance(stream, HostStream):
            return HostEvent(
                memory.tensor(place, (TIMELINE_NBYTES // 8,), torch.int64), stream, told=not self._has_gpus
            )
        return self._counters_by_worker[number]

    def close(self) -> None:
        """Free everything; the workers must have ended."""
        for record in self._all_counters:
            record.release()  # There may be waits for what they had queued, and to free memory waits for those.
        self._buffer_pool.close()
        if self.wakeup is not None:
            self.wakeup.close()
        for memory in self._all:
            memory.free()
        self._all.clear()
        self._free.clear()
        for numbers in self._counters:
            numbers.free()
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
