"""GPU memory that processes share by CUDA IPC, the counterpart of `drp.protocol.memory` on the host.

The CUDA runtime is called through ctypes, because torch's own sharing exports whole segments of its caching allocator,
counts references in a file, and synchronizes the stream beyond 1000 shares. Memory is allocated separately here, so
that its handle exposes nothing else. The owner keeps the memory and its event until all processes that opened them have
ended: freeing exported memory earlier is undefined behaviour.
"""

from __future__ import annotations

import ctypes
import functools
import re
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drp.errors import CudaError, ProtocolError
from drp.protocol.handles import GpuHandle, Handle
from drp.protocol.memory import Memory, SharedMemory, check_fit
from drp.protocol.timeline import CANCEL_ALL, TIMELINE_NBYTES

HANDLE = 64
"""The length of an IPC handle in bytes."""
INTERPROCESS_EVENT = 2 | 4
"""cudaEventDisableTiming | cudaEventInterprocess."""
LAZY_PEER_ACCESS = 1
PORTABLE_AND_MAPPED = 1 | 2
MAX_COUNTERS = 1024
"""The number of counters: one for each worker process that is started."""
ALLOCATION_GRANULARITY = 1 << 21
"""Allocations are multiples of this. CUDA carves smaller ones from blocks, of which a handle shares the whole."""


class _Opaque(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char * HANDLE),)


def uuid_of(index: int) -> str:
    """Return the UUID, with its prefix, of the GPU with an index in this process."""
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def index_of(uuid: str) -> int:
    """Return a GPU's index in this process; raise ProtocolError if the process does not see the GPU."""
    seen = [uuid_of(index) for index in range(torch.cuda.device_count())]
    if uuid not in seen:
        raise ProtocolError(f"this process does not see the GPU {uuid!r:.60}; it sees {', '.join(seen) or 'none'}")
    return seen.index(uuid)


class GpuMemory:
    """Memory of one GPU, and an event of its owner. Methods use the calling thread's current stream."""

    number = 0  # IPC handles are never reused, so nothing else has to tell one memory from another.

    def __init__(
        self, address: int, event: int, handle: GpuHandle, index: int, keep: Callable[[GpuMemory], None] | None = None
    ) -> None:
        self._address, self._event, self._handle, self._keep = address, event, handle, keep
        self.nbytes, self.device = handle.nbytes, torch.device("cuda", index)
        self._span = _Span(address, handle.nbytes)
        with torch.inference_mode(mode=False):  # Its tensors are used inside inference mode and outside.
            opened = keep is None
            self._bytes = _opened_bytes(self) if opened else torch.as_tensor(self._span, device=self.device)
        if self._bytes.data_ptr() != address:
            raise CudaError(f"torch does not find that memory on {self.device}, and has copied it")

    @classmethod
    def create(cls, nbytes: int, uuid: str, keep: Callable[[GpuMemory], None]) -> GpuMemory:
        """Allocate zeroed memory; raise MemoryError if the GPU has too little. `close` passes the memory to `keep`."""
        index = index_of(uuid)
        with torch.cuda.device(index):
            torch.cuda.current_stream()  # The runtime's calls below need torch's context on this device.
            address, event = ctypes.c_void_p(), ctypes.c_void_p()
            size = ctypes.c_size_t(-(-nbytes // ALLOCATION_GRANULARITY) * ALLOCATION_GRANULARITY)
            try:
                _call_runtime("cudaMalloc", ctypes.byref(address), size)
            except CudaError:
                torch.cuda.empty_cache()  # Memory that torch caches may suffice.
                try:
                    _call_runtime("cudaMalloc", ctypes.byref(address), size)
                except CudaError as error:
                    raise MemoryError(f"no {nbytes} bytes on cuda:{index} ({uuid}): {error}") from error
            try:
                _call_runtime("cudaMemset", address, 0, ctypes.c_size_t(nbytes))
                _call_runtime("cudaStreamSynchronize", None)  # Not the device: other streams may wait for workers.
                _call_runtime("cudaEventCreateWithFlags", ctypes.byref(event), INTERPROCESS_EVENT)
                memory, shared = _Opaque(), _Opaque()
                _call_runtime("cudaIpcGetMemHandle", ctypes.byref(memory), address)
                _call_runtime("cudaIpcGetEventHandle", ctypes.byref(shared), event)
            except CudaError:
                if event.value:
                    _call_runtime("cudaEventDestroy", event)
                _call_runtime("cudaFree", address)
                raise
            handle = GpuHandle(uuid, nbytes, bytes(memory), bytes(shared))
            return cls(int(address.value or 0), int(event.value or 0), handle, index, keep)

    @classmethod
    def open(cls, handle: GpuHandle) -> GpuMemory:
        """Open another process's memory and its event; raise CudaError if the driver refuses.

        Both are opened on the current device, so that this process needs no context on a peer that they belong to. For
        torch, the tensors are on the current device, whose kernels access a peer directly.
        """
        if handle.nbytes < 1 or len(handle.memory) != HANDLE or len(handle.event) != HANDLE:
            raise ProtocolError(
                f"a GPU's memory of {handle.nbytes} bytes; a handle has {HANDLE} bytes, and so the event's"
            )
        torch.cuda.current_stream()
        address, event = ctypes.c_void_p(), ctypes.c_void_p()
        memory, shared = _Opaque.from_buffer_copy(handle.memory), _Opaque.from_buffer_copy(handle.event)
        _call_runtime("cudaIpcOpenMemHandle", ctypes.byref(address), memory, LAZY_PEER_ACCESS)
        _call_runtime("cudaIpcOpenEventHandle", ctypes.byref(event), shared)
        return cls(int(address.value or 0), int(event.value or 0), handle, torch.cuda.current_device())

    @property
    def ipc_handles(self) -> tuple[Handle | None, GpuHandle | None]:
        return None, self._handle

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = check_fit(offset, shape, dtype, self.nbytes)
        return self._bytes[offset : offset + count * dtype.itemsize].view(dtype).view(tuple(shape))

    def record_event(self) -> None:
        with torch.cuda.device(self.device):  # The default stream is null, which means that of the current device.
            stream = torch.cuda.current_stream().cuda_stream
            _call_runtime("cudaEventRecord", ctypes.c_void_p(self._event), ctypes.c_void_p(stream))

    def wait_event(self) -> None:
        """Have the current stream, of the current device, wait for the event as it was last recorded."""
        stream = torch.cuda.current_stream().cuda_stream
        _call_runtime("cudaStreamWaitEvent", ctypes.c_void_p(stream), ctypes.c_void_p(self._event), 0)

    def close(self, reuse: bool = True) -> None:
        """Pass memory of this process to `keep`, which frees it later; memory of another process stays open.

        Without `reuse`, as while another process may still write to it, it is not passed on.
        """
        if self._keep is not None and reuse:
            self._keep(self)

    def free(self) -> None:
        """Free the memory after the operations queued on its GPU. Its tensors must not be used any more."""
        _free(self._address, self._event, self.device)

    def free_with_tensors(self) -> None:
        """Free the memory once it has no tensors any more; this object must not be used any more."""
        weakref.finalize(self._span, _free, self._address, self._event, self.device).atexit = False
        del self._span, self._bytes


class GpuCounters:
    """int64 counters in the leader's host memory, TIMELINE_NBYTES apart, which GPUs write and wait for on streams.

    They replace interprocess events because of lost workers. A stream that waits for an event recorded by a process
    whose context is then lost waits forever, even if the event is recorded again (seen with CUDA 13 on an H200). The
    leader can write a counter on behalf of a lost worker.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self._memory, self.count = memory, memory.nbytes // TIMELINE_NBYTES
        self._numbers = memory.tensor(0, (self.count, TIMELINE_NBYTES // 8), torch.int64)
        self._start, address = self._numbers.data_ptr(), ctypes.c_void_p()
        nbytes = ctypes.c_size_t(memory.nbytes)
        _call_runtime("cudaHostRegister", ctypes.c_void_p(self._start), nbytes, PORTABLE_AND_MAPPED)
        _call_runtime("cudaHostGetDevicePointer", ctypes.byref(address), ctypes.c_void_p(self._start), 0)
        self._address = address.value or 0

    @classmethod
    def create(cls) -> GpuCounters:
        """Create counters that are 0, and a context on the current device; raise CudaError if streams cannot write."""
        torch.cuda.current_stream()  # The runtime's calls need torch's context on this device.
        memory = SharedMemory.create(MAX_COUNTERS * TIMELINE_NBYTES)
        try:
            counters = cls(memory)
            counters.write(MAX_COUNTERS - 1, 1)
            counters.wait(MAX_COUNTERS - 1, 1)
            torch.cuda.current_stream().synchronize()
            counters.set(MAX_COUNTERS - 1, 0)
        except CudaError:
            memory.close()
            raise
        return counters

    @classmethod
    def open(cls, handle: Handle) -> GpuCounters:
        """Open the leader's counters, which stay open."""
        torch.cuda.current_stream()
        return cls(SharedMemory.open(handle))

    @property
    def handle(self) -> Handle:
        """The handle with which a worker opens the counters."""
        return self._memory.handle

    def write(self, index: int, number: int) -> None:
        """Have the current stream write a number, after the operations queued before."""
        _call_driver("cuStreamWriteValue64_v2", self._address + index * TIMELINE_NBYTES, number)

    def wait(self, index: int, number: int) -> None:
        """Have the current stream wait until the counter reaches a number."""
        _call_driver("cuStreamWaitValue64_v2", self._address + index * TIMELINE_NBYTES, number)

    def set(self, index: int, number: int) -> None:
        self._numbers[index, 0] = number

    def free(self) -> None:
        """Free the counters; no stream may wait for them any more."""
        _call_runtime("cudaHostUnregister", ctypes.c_void_p(self._start))
        self._memory.close()
        self._numbers = torch.empty(0)  # The last tensor keeps the memory mapped.


class GpuStream:
    """Two torch streams, which implement `drp.protocol.timeline.Stream` on a GPU."""

    pending_waits = 0

    def __init__(self, device: torch.device) -> None:
        self._stream, self._side = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types for it

    def enqueue(self, do: Callable[..., object], *args: Any) -> None:
        do(*args)

    def run_ready(self, notify: bool = True) -> None:
        """Do nothing, since the GPU executes the operations by itself."""

    @property
    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    @property
    def side_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._side)

    def record(self) -> Any:
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
        event.record(self._stream)
        return event

    def query(self, mark: Any) -> bool:
        return bool(mark.query())

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        """Do nothing: queued operations complete, and their memory is kept."""


class ArenaEvent:
    """The leader's event for a run whose memory is on its GPU: the event of that memory."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def record(self) -> int:
        self._memory.record_event()
        return 0

    def cancel_before(self, least: int) -> None:
        """Do nothing, since operations queued on a GPU cannot be cancelled."""

    def wait(self, number: int) -> None:
        self._memory.wait_event()


class WorkerCounter:
    """A worker's event: one of the leader's counters, which counts the worker's drafts in all runs."""

    def __init__(self, counters: GpuCounters, index: int) -> None:
        if index >= counters.count:
            raise ProtocolError(f"counter {index} is out of range; there are {counters.count}")
        self._counters, self._index, self._count = counters, index, 0

    def record(self) -> int:
        self._count += 1
        self._counters.write(self._index, self._count)
        return self._count


class WorkerCounterView:
    """The leader's view of the counter of one worker process."""

    def __init__(self, counters: GpuCounters, index: int) -> None:
        self.counters, self.index, self._count = counters, index, 0

    def wait(self) -> None:
        """Have the current stream wait for the worker's next draft, which the worker has acknowledged as queued."""
        self._count += 1
        self.counters.wait(self.index, self._count)

    def release(self) -> None:
        self.counters.set(self.index, CANCEL_ALL)


class _Span:
    """Bytes at an address, for `torch.as_tensor`."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _opened_bytes(memory: GpuMemory) -> Tensor:
    """Return opened memory as a tensor on its `device`; `torch.as_tensor` may find a peer that the memory lies on."""
    storage = torch._C._construct_storage_from_data_pointer(memory._address, memory.device, memory.nbytes)
    return torch.empty(0, dtype=torch.uint8, device=memory.device).set_(storage)


def _free(address: int, event: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        _call_runtime("cudaEventDestroy", ctypes.c_void_p(event))
        _call_runtime("cudaFree", ctypes.c_void_p(address))


def invert_probe(memory: GpuMemory) -> None:
    """Replace each byte b by 255 - b, through a copy on the current device: this tests copies in both directions."""
    there = memory.tensor(0, (memory.nbytes,), torch.uint8)
    memory.wait_event()
    here = there.to(torch.device("cuda", torch.cuda.current_device()), copy=True)
    there.copy_(255 - here)
    torch.cuda.current_stream().synchronize()


def is_inverted(memory: GpuMemory, pattern: Tensor) -> bool:
    """Whether another process has applied `invert_probe` to memory that held this pattern, uint8 on the host."""
    return torch.equal(memory.tensor(0, (memory.nbytes,), torch.uint8).cpu(), 255 - pattern)


def pin(address: int, nbytes: int) -> bool:
    """Pin memory of the host, so that copies from and to it are asynchronous; return whether that is possible here."""
    try:
        _call_runtime("cudaHostRegister", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), 0)
    except CudaError:
        return False
    return True


def unpin(address: int) -> None:
    """Let go of memory that was pinned."""
    _call_runtime("cudaHostUnregister", ctypes.c_void_p(address))


@functools.cache
def _runtime() -> Any:
    """Return the CUDA runtime library that torch has loaded; another copy would have separate state."""
    torch.cuda.init()  # type: ignore[no-untyped-call]  # torch has no types for it
    try:
        library = ctypes.CDLL(_find_runtime(Path("/proc/self/maps").read_text(), torch.version.cuda or ""))
    except OSError as error:
        raise CudaError(f"torch is loaded without its own CUDA runtime library: {error}") from error
    library.cudaGetErrorString.restype = ctypes.c_char_p
    library.cudaIpcOpenMemHandle.argtypes = (ctypes.c_void_p, _Opaque, ctypes.c_uint)
    library.cudaIpcOpenEventHandle.argtypes = (ctypes.c_void_p, _Opaque)
    library.cudaStreamSynchronize.argtypes = (ctypes.c_void_p,)
    return library


def _find_runtime(maps: str, version: str) -> str:
    """Return the path of the loaded runtime of torch's CUDA version, of which a program may have loaded several."""
    name = f"libcudart.so.{version.split('.')[0]}"
    loaded = re.findall(r"(/.*/libcudart[^/]*\.so\.(\d+)[\d.]*)$", maps, re.MULTILINE)
    return next((path for path, major in loaded if name.endswith(f".{major}")), name)


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _call_driver(name: str, address: int, number: int) -> None:
    """Queue a write of a number, or a wait until it is reached, on the current stream; flags of 0 mean this."""
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    if not hasattr(_driver(), name):
        raise CudaError(f"the driver has no {name}; install the driver of CUDA 11.7 or newer")
    code = getattr(_driver(), name)(stream, ctypes.c_uint64(address), ctypes.c_uint64(number), 0)
    if code:
        raise CudaError(f"{name} failed: the driver says {code}")


def _call_runtime(name: str, *arguments: Any) -> None:
    code = getattr(_runtime(), name)(*arguments)
    if code:
        _runtime().cudaGetLastError()  # Clear it; torch would report it after its own next call.
        raise CudaError(f"{name} failed: {_runtime().cudaGetErrorString(code).decode()} ({code})")
