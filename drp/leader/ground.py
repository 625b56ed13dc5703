"""Ground: where the leader computes and its runs' memory lies: on the host, or on the GPU of its first worker."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drp.leader.devices import Device
from drp.leader.lane import Lane, LaneRecord
from drp.leader.spare import Spare
from drp.protocol.bell import OwnBell
from drp.protocol.cuda import CudaError, EventRecord, GpuEvent, GpuMemory, GpuStream, RunRecord, is_turned
from drp.protocol.memory import Memory
from drp.protocol.messages import GpuHandle, Half, OnGpu
from drp.protocol.order import LINE, OwnRecord, Stream, WorkersRecord

PROBE = 4096
LEAST = 1 << 21
"""Bytes of the smallest block; cudaMalloc gives no less."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuOptions:
    """How workers use their GPUs. Not yet run on a GPU: see docs/gpus.md.

    dtype: of the weights and of what they are applied to, "float16" or "bfloat16"; by default the model's own. States
        and predictions stay float32.
    compile: send the model through torch.compile.
    graphs: capture its evaluations as CUDA graphs, one for each shape.
    nvtx: name what leader and workers do in ranges, for Nsight Systems.
    memory: "auto": runs lie in the memory of the first worker's GPU if all workers can reach it, else on the host.
        "host": on the host, in any case: workers copy drafts to their GPU and predictions back.
    ordering: "host": a worker waits for its GPU before it answers. "device": it answers at once, and waits are queued
        on the GPUs; stamps prove what was read, see docs/gpus.md. Workers on cores do the same with threads, and do not
        even answer. Not with `hedge`.
    """

    dtype: Half | None = None
    compile: bool = False
    graphs: bool = False
    memory: str = "auto"
    ordering: str = "host"
    nvtx: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float16", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; give 'bfloat16', 'float16', or None for the model's own")
        if self.memory not in ("auto", "host"):
            raise ValueError(f"memory is {self.memory!r}; give 'auto' or 'host'")
        if self.ordering not in ("host", "device"):
            raise ValueError(f"ordering is {self.ordering!r}; give 'host' or 'device'")

    def on(self, uuid: str, batch: int, probe: GpuHandle | None = None) -> OnGpu:
        """Return what a worker on this GPU is told."""
        return OnGpu(uuid, self.dtype, self.compile, self.graphs, batch, probe, self.nvtx)


class Ground:
    """Memory for runs, lent as often as it is asked for and freed at the end: workers keep what they have opened.

    It begins on the GPU of the first device, if that is one, and moves to the host for good as soon as a worker cannot
    reach it. `enter` is called in the thread that computes.
    """

    def __init__(self, devices: Sequence[Device], options: GpuOptions, batch: int) -> None:
        self._uuid = devices[0].gpu if options.memory == "auto" else None
        self._options, self._batch = options, batch
        self._has_gpus = devices[0].gpu is not None
        self.nvtx = options.nvtx and self._has_gpus
        self._spare = Spare()
        self._all: list[GpuMemory] = []
        self._free: list[GpuMemory] = []
        self._probes: dict[int, GpuMemory] = {}
        self.ahead = options.ordering == "device"
        """Whether answers run ahead of the devices."""
        self.bell = OwnBell() if self.ahead else None
        """With which workers wake the leader."""
        self._sequences = itertools.count()
        self._events: dict[int, GpuEvent] = {}
        self._all_events: list[GpuEvent] = []
        self._pattern = (torch.arange(PROBE) % 251).to(torch.uint8)

    def enter(self) -> None:
        """Compute on the GPU, in a stream of its own, from here on in this thread; or on the host, if that fails."""
        if self._uuid is None:
            return
        try:
            memory = self._create(LEAST)
            torch.cuda.set_device(memory.device)
            torch.cuda.set_stream(torch.cuda.Stream(memory.device))  # type: ignore[no-untyped-call]  # torch has no types for it
            self._free.append(memory)
        except (CudaError, MemoryError, RuntimeError) as error:
            self._leave(f"the leader cannot share memory of {self._uuid}: {error}")

    def how(self, number: int, device: Device) -> OnGpu | None:
        """Return what a worker is told of its GPU, None without one; with a probe, if it has to reach the leader's."""
        if device.gpu is None:
            return None
        if self.ahead and self._uuid is not None:  # another for each worker: the last one may have left it recorded
            self._events[number] = GpuEvent.create()
            self._all_events.append(self._events[number])
        return self._options.on(device.gpu, self._batch, self._probe(number))

    def judge(self, number: int, worker: str, unreached: str) -> str:
        """Look at what a worker has made of its probe; return why it cannot be used, empty if it can.

        As long as no run lies on the GPU there is a remedy: they all go to the host.
        """
        if self._uuid is None or number not in self._probes:
            return ""
        if not unreached and is_turned(self._probes[number], self._pattern):
            return ""
        why = f"{worker} cannot reach the memory of {self._uuid}: {unreached or 'what it wrote did not arrive'}"
        if len(self._all) > len(self._free) + len(self._probes):
            return why
        self._leave(why)
        return ""

    def make(self, nbytes: int) -> Memory:
        """Return memory for a run, at least so long; closing it gives it back."""
        if self._uuid is None:
            return self._spare.take(nbytes)
        size = max(LEAST, 1 << (nbytes - 1).bit_length())
        memory = next((each for each in self._free if each.nbytes == size), None)
        if memory is None:
            return self._create(size)
        self._free.remove(memory)
        return memory

    @property
    def on_gpu(self) -> bool:
        """Whether runs lie on a GPU: its streams go on by themselves, and have to be looked at."""
        return self._uuid is not None

    @property
    def hears(self) -> bool:
        """Whether workers say that a draft is queued: GPUs may fail at that, and their events have no numbers."""
        return self._has_gpus

    def number(self) -> int:
        """Return a sequence number for a draft, which none of the last four billion has."""
        return 1 + next(self._sequences) % (2**32 - 1)

    def take(self, nbytes: int) -> Memory:
        """Do as `make` does, for a run with a stream of its own: it comes after the run that had the memory before."""
        memory = self.make(nbytes)
        memory.follow()
        return memory

    def stream(self) -> Stream:
        """Return a stream for one run, to be closed with it."""
        if self._uuid is None:
            return Lane()
        return GpuStream(torch.device("cuda", torch.cuda.current_device()))

    def own(self, memory: Memory, place: int, stream: Stream) -> OwnRecord:
        """Return what the leader records of a run; on the host its numbers are at this place of the run's memory."""
        if isinstance(stream, Lane):
            return LaneRecord(memory.tensor(place, (LINE // 8,), torch.int64), stream)
        return RunRecord(memory)

    def workers(self, number: int, memory: Memory, place: int, stream: Stream) -> tuple[WorkersRecord, bytes | None]:
        """Return what a worker records of a run, and the handle of its event; on the host as above."""
        if isinstance(stream, Lane):
            line = memory.tensor(place, (LINE // 8,), torch.int64)
            return LaneRecord(line, stream, told=not self._has_gpus), None
        assert isinstance(stream, GpuStream)
        event = self._events[number]
        return EventRecord(event, stream), event.handle

    def close(self) -> None:
        """Free everything; the workers must have ended."""
        self._spare.close()
        if self.bell is not None:
            self.bell.close()
        for event in self._all_events:
            event.free()
        self._all_events.clear()
        for memory in self._all:
            memory.free()
        self._all.clear()
        self._free.clear()

    def _create(self, nbytes: int) -> GpuMemory:
        assert self._uuid is not None
        memory = GpuMemory.create(nbytes, self._uuid, self._free.append)
        self._all.append(memory)
        return memory

    def _probe(self, number: int) -> GpuHandle | None:
        if self._uuid is None:
            return None
        if number not in self._probes:
            self._probes[number] = self._create(PROBE)
        memory = self._probes[number]
        memory.tensor(0, (PROBE,), torch.uint8).copy_(self._pattern)
        memory.written()
        return memory.names[1]

    def _leave(self, why: str) -> None:
        log.warning("runs will lie on the host, and be copied to the GPUs through pinned memory: %s", why)
        self._uuid = None
