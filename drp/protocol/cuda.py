"""Memory of a GPU that processes share, by CUDA IPC: what `drp.protocol.memory` is on the host.

The runtime is called through ctypes: torch's own sharing hands out pieces of its caching allocator, counts references
in a file, and synchronises the stream beyond 1000 shares. An allocation here is one of its own, so a handle exposes
nothing else. Its owner keeps it, and the event beside it, until those who opened it have ended: to free exported memory
earlier is undefined.
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
"""Bytes of a handle."""
NO_TIMES_BUT_SHARED = 2 | 4
"""cudaEventDisableTiming and cudaEventInterprocess."""
LAZY_PEER_ACCESS = 1
PORTABLE_AND_MAPPED = 1 | 2
MAX_COUNTERS = 1024
"""How many numbers there are in one memory: one for each worker that is started."""


class _Opaque(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_char * HANDLE),)


def uuid_of(index: int) -> str:
    """Return a GPU's UUID, with its prefix, by its number in this process."""
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def index_of(uuid: str) -> int:
    """Return a GPU's number in this process; raise ProtocolError if it does not see the GPU."""
    seen = [uuid_of(index) for index in range(torch.cuda.device_count())]
    if uuid not in seen:
        raise ProtocolError(f"this process does not see the GPU {uuid!r:.60}; it sees {', '.join(seen) or 'none'}")
    return seen.index(uuid)


class GpuMemory:
    """Memory of one GPU, and its owner's event. The current stream of the calling thread is the one that counts."""

    number = 0  # Its handle is no other memory's.

    def __init__(
        self, address: int, event: int, handle: GpuHandle, index: int, keep: Callable[[GpuMemory], None] | None = None
    ) -> None:
        self._address, self._event, self._handle, self._keep = address, event, handle, keep
        self.nbytes, self.device = handle.nbytes, torch.device("cuda", index)
        self._span = _Span(address, handle.nbytes)
        self._bytes = _as_tensor(self._span, address, (index, torch.cuda.current_device()))

    @classmethod
    def create(cls, nbytes: int, uuid: str, keep: Callable[[GpuMemory], None]) -> GpuMemory:
        """Allocate, zeroed; raise MemoryError if the GPU has not so much. `close` hands it to `keep`."""
        index = index_of(uuid)
        with torch.cuda.device(index):
            torch.cuda.current_stream()  # The runtime's calls below need torch's context on this device.
            address, event = ctypes.c_void_p(), ctypes.c_void_p()
            try:
                _call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(nbytes))
            except CudaError:
                torch.cuda.empty_cache()  # What torch holds for later may be enough.
                try:
                    _call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(nbytes))
                except CudaError as error:
                    raise MemoryError(f"no {nbytes} bytes on cuda:{index} ({uuid}): {error}") from error
            try:
                _call("cudaMemset", address, 0, ctypes.c_size_t(nbytes))
                _call("cudaStreamSynchronize", None)  # not the device: other streams may wait for workers
                _call("cudaEventCreateWithFlags", ctypes.byref(event), NO_TIMES_BUT_SHARED)
                memory, shared = _Opaque(), _Opaque()
                _call("cudaIpcGetMemHandle", ctypes.byref(memory), address)
                _call("cudaIpcGetEventHandle", ctypes.byref(shared), event)
            except CudaError:
                if event.value:
                    _call("cudaEventDestroy", event)
                _call("cudaFree", address)
                raise
            handle = GpuHandle(uuid, nbytes, bytes(memory), bytes(shared))
            return cls(int(address.value or 0), int(event.value or 0), handle, index, keep)

    @classmethod
    def open(cls, handle: GpuHandle) -> GpuMemory:
        """Open a peer's, into the context of the current device; CudaError if the driver does not do that here."""
        if handle.nbytes < 1 or len(handle.memory) != HANDLE or len(handle.event) != HANDLE:
            raise ProtocolError(
                f"a GPU's memory of {handle.nbytes} bytes; a handle has {HANDLE} bytes, and so the event's"
            )
        index = index_of(handle.device)
        torch.cuda.current_stream()
        address, event = ctypes.c_void_p(), ctypes.c_void_p()
        memory, shared = _Opaque.from_buffer_copy(handle.memory), _Opaque.from_buffer_copy(handle.event)
        _call("cudaIpcOpenMemHandle", ctypes.byref(address), memory, LAZY_PEER_ACCESS)
        with torch.cuda.device(index):
            _call("cudaIpcOpenEventHandle", ctypes.byref(event), shared)
        return cls(int(address.value or 0), int(event.value or 0), handle, index)

    @property
    def ipc_handles(self) -> tuple[Handle | None, GpuHandle | None]:
        return None, self._handle

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = check_fit(offset, shape, dtype, self.nbytes)
        return self._bytes[offset : offset + count * dtype.itemsize].view(dtype).view(tuple(shape))

    def record_event(self) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        _call("cudaEventRecord", ctypes.c_void_p(self._event), ctypes.c_void_p(stream))

    def wait_event(self) -> None:
        """Have the current stream, of the current device, wait for the event as it was last recorded."""
        stream = torch.cuda.current_stream().cuda_stream
        _call("cudaStreamWaitEvent", ctypes.c_void_p(stream), ctypes.c_void_p(self._event), 0)

    def close(self, reuse: bool = True) -> None:
        """Hand it to whoever keeps it: it is freed when those who opened it have ended. A peer's stays open.

        If somebody may still write to it, nobody has it again until then.
        """
        if self._keep is not None and reuse:
            self._keep(self)

    def free(self) -> None:
        """Free it; what was queued there is waited for. No tensor of it may be used any more."""
        _free(self._address, self._event, self.device)

    def free_with_tensors(self) -> None:
        """Free it as soon as no tensor of it exists any more; this object must not be used any more."""
        weakref.finalize(self._span, _free, self._address, self._event, self.device).atexit = False
        del self._span, self._bytes


class GpuCounters:
    """int64 numbers on the host, of the leader's, LINE bytes apart: GPUs write them, and wait for them, on streams.

    Where an interprocess event would do as well, as long as all goes well: a stream that waits for one which a process
    has recorded whose context is then lost waits for good, whoever records it anew (seen with CUDA 13 on an H200). A
    number can be written in the place of a worker that is gone.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self._memory, self.count = memory, memory.nbytes // TIMELINE_NBYTES
        self._numbers = memory.tensor(0, (self.count, TIMELINE_NBYTES // 8), torch.int64)
        self._start, address = self._numbers.data_ptr(), ctypes.c_void_p()
        _call("cudaHostRegister", ctypes.c_void_p(self._start), ctypes.c_size_t(memory.nbytes), PORTABLE_AND_MAPPED)
        _call("cudaHostGetDevicePointer", ctypes.byref(address), ctypes.c_void_p(self._start), 0)
        self._address = address.value or 0

    @classmethod
    def create(cls) -> GpuCounters:
        """Make some, all 0, with a context on the current device; CudaError if its streams cannot write them."""
        torch.cuda.current_stream()  # The runtime's calls need torch's context on this device.
        memory = SharedMemory.create(MAX_COUNTERS * TIMELINE_NBYTES)
        try:
            numbers = cls(memory)
            numbers.write(MAX_COUNTERS - 1, 1)
            numbers.wait(MAX_COUNTERS - 1, 1)
            torch.cuda.current_stream().synchronize()
            numbers.set(MAX_COUNTERS - 1, 0)
        except CudaError:
            memory.close()
            raise
        return numbers

    @classmethod
    def open(cls, handle: Handle) -> GpuCounters:
        """Open the leader's; they stay open."""
        torch.cuda.current_stream()
        return cls(SharedMemory.open(handle))

    @property
    def handle(self) -> Handle:
        """What a worker needs to open them."""
        return self._memory.handle

    def write(self, line: int, number: int) -> None:
        """Have the current stream write a number, after all that was queued on it before."""
        _drive("cuStreamWriteValue64_v2", self._address + line * TIMELINE_NBYTES, number)

    def wait(self, line: int, number: int) -> None:
        """Have the current stream wait until the number there is so high."""
        _drive("cuStreamWaitValue64_v2", self._address + line * TIMELINE_NBYTES, number)

    def set(self, line: int, number: int) -> None:
        self._numbers[line, 0] = number

    def free(self) -> None:
        """Let go of them; nothing that waits for them may be queued any more."""
        _call("cudaHostUnregister", ctypes.c_void_p(self._start))
        self._memory.close()
        self._numbers = torch.empty(0)  # The mapping goes with the last tensor of it.


class GpuStream:
    """A stream of torch's, and another aside: `drp.protocol.timeline.Stream` on a GPU."""

    pending_waits = 0

    def __init__(self, device: torch.device) -> None:
        self._stream, self._aside = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types for it

    def enqueue(self, do: Callable[[], object]) -> None:
        do()

    def run_ready(self) -> None:
        """Do nothing: the GPU does."""

    def current(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def side_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._aside)

    def record(self) -> Any:
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
        event.record(self._stream)
        return event

    def query(self, mark: Any) -> bool:
        return bool(mark.query())

    def synchronize(self) -> None:
        self._stream.synchronize()

    def close(self) -> None:
        """Do nothing: what was queued runs to its end, in memory that stays."""


class ArenaEvent:
    """What the leader records of a run whose memory lies on its GPU: that memory's own event."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    def record(self) -> int:
        self._memory.record_event()
        return 0

    def cancel_before(self, least: int) -> None:
        """Do nothing: what is queued on a GPU is done."""

    def wait(self, number: int) -> None:
        self._memory.wait_event()


class WorkerCounter:
    """What a worker records: how many drafts it has done, all runs together, in a line of the leader's."""

    def __init__(self, numbers: GpuCounters, line: int) -> None:
        if line >= numbers.count:
            raise ProtocolError(f"the line {line} of {numbers.count}")
        self._counters, self._index, self._count = numbers, line, 0

    def record(self) -> int:
        self._count += 1
        self._counters.write(self._index, self._count)
        return self._count


class WorkerCounterView:
    """What one worker, and none that takes its place, records, as the leader has it."""

    def __init__(self, numbers: GpuCounters, line: int) -> None:
        self.counters, self.index, self._count = numbers, line, 0

    def wait(self) -> None:
        """Have the current stream wait for the next, once the worker has said that it is queued."""
        self._count += 1
        self.counters.wait(self.index, self._count)

    def release(self) -> None:
        self.counters.set(self.index, CANCEL_ALL)


class _Span:
    """Bytes at an address, as torch.as_tensor takes them."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def _as_tensor(span: _Span, address: int, devices: Sequence[int]) -> Tensor:
    """Return the bytes there as a tensor, for which torch finds the device by the address.

    Of a peer's memory it may find the GPU that has opened it, or the one that it lies on; for any other it would return
    a copy. Memory is used by calls inside inference mode and outside, for which the tensor must not be made in it.
    """
    with torch.inference_mode(mode=False):
        for index in devices:
            made = torch.as_tensor(span, device=torch.device("cuda", index))
            if made.data_ptr() == address:
                return made
    raise CudaError(f"torch does not find that memory on {', '.join(f'cuda:{index}' for index in devices)}")


def _free(address: int, event: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        _call("cudaEventDestroy", ctypes.c_void_p(event))
        _call("cudaFree", ctypes.c_void_p(address))


def invert_probe(memory: GpuMemory) -> None:
    """Turn each byte b into 255 - b, by way of a copy on the current device and back: a proof that both ways work."""
    there = memory.tensor(0, (memory.nbytes,), torch.uint8)
    memory.wait_event()
    here = there.to(torch.device("cuda", torch.cuda.current_device()), copy=True)
    there.copy_(255 - here)
    torch.cuda.current_stream().synchronize()


def is_inverted(memory: GpuMemory, pattern: Tensor) -> bool:
    """Whether a peer has turned over what was this pattern, uint8 on the host."""
    return torch.equal(memory.tensor(0, (memory.nbytes,), torch.uint8).cpu(), 255 - pattern)


def pin(address: int, nbytes: int) -> bool:
    """Pin memory of the host, so that copies from and to it are asynchronous; return whether that is possible here."""
    try:
        _call("cudaHostRegister", ctypes.c_void_p(address), ctypes.c_size_t(nbytes), 0)
    except CudaError:
        return False
    return True


def unpin(address: int) -> None:
    """Let go of memory that was pinned."""
    _call("cudaHostUnregister", ctypes.c_void_p(address))


@functools.cache
def _runtime() -> Any:
    """Return the CUDA runtime that torch has loaded: another copy of the library would have other state."""
    torch.cuda.init()  # type: ignore[no-untyped-call]  # torch has no types for it
    found = re.findall(r"\S*/libcudart[^/\s]*\.so[\d.]*", Path("/proc/self/maps").read_text())
    try:
        library = ctypes.CDLL(found[0] if found else f"libcudart.so.{(torch.version.cuda or '').split('.')[0]}")
    except OSError as error:
        raise CudaError(f"torch is loaded without a CUDA runtime library of its own: {error}") from error
    library.cudaGetErrorString.restype = ctypes.c_char_p
    library.cudaIpcOpenMemHandle.argtypes = (ctypes.c_void_p, _Opaque, ctypes.c_uint)
    library.cudaIpcOpenEventHandle.argtypes = (ctypes.c_void_p, _Opaque)
    library.cudaStreamSynchronize.argtypes = (ctypes.c_void_p,)
    return library


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _drive(name: str, address: int, number: int) -> None:
    """Queue a number's writing, or the wait until it is reached, which is what flags of 0 say."""
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
    if not hasattr(_driver(), name):
        raise CudaError(f"the driver has no {name}; CUDA 11.7's and newer ones have")
    code = getattr(_driver(), name)(stream, ctypes.c_uint64(address), ctypes.c_uint64(number), 0)
    if code:
        raise CudaError(f"{name} failed: the driver says {code}")


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_runtime(), name)(*arguments)
    if code:
        _runtime().cudaGetLastError()  # Else torch would find it after its own next call.
        raise CudaError(f"{name} failed: {_runtime().cudaGetErrorString(code).decode()} ({code})")
