"""The functions of CUDA's runtime and driver that drp calls, on devices that are the host.

CUDA IPC is a memfd, which other processes open by /proc. A handle has the process, the descriptor and the size.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
from collections.abc import Callable
from typing import Any

from tests.host_cuda.torch_cuda import native  # before torch

import torch  # isort: skip

from drp.errors import CudaError
from drp.models.gpu import Graphs
from drp.protocol import cuda
from tests.worker_interpreter import make_replay

HANDLE = struct.Struct("<QQQ")
DEADLINE = 60.0
"""Seconds that a stream waits for a counter."""
IGNORED = {
    "cudaEventDestroy", "cudaEventRecord", "cudaHostRegister", "cudaHostUnregister", "cudaIpcGetEventHandle",
    "cudaIpcOpenEventHandle", "cudaMemset", "cudaStreamSynchronize", "cudaStreamWaitEvent",
}  # fmt: skip

_blocks: dict[int, tuple[int, int, Any]] = {}
"""By address: the descriptor, the size, and what keeps it mapped."""
_freed: list[Any] = []
"""Tensors may still be in it, as they would be in memory that CUDA has given to others."""


def _map(fd: int, nbytes: int) -> int:
    mapped = mmap.mmap(fd, nbytes)
    view = (ctypes.c_char * nbytes).from_buffer(mapped)
    address = ctypes.addressof(view)
    _blocks[address] = fd, nbytes, (mapped, view)
    return address


def call_runtime(name: str, *arguments: Any) -> None:
    """Call a function of the runtime; raise CudaError if it fails."""
    first: Any = getattr(arguments[0], "_obj", arguments[0])  # A result's place is given by reference.
    match name:
        case "cudaMalloc":
            fd = os.memfd_create("gpu")
            os.ftruncate(fd, arguments[1].value)
            first.value = _map(fd, arguments[1].value)
        case "cudaFree":
            fd, _, kept = _blocks.pop(first.value)
            os.close(fd)
            _freed.append(kept)
        case "cudaIpcGetMemHandle":
            fd, nbytes, _ = _blocks[arguments[1].value]
            handle = HANDLE.pack(os.getpid(), fd, nbytes).ljust(64, b"\0")
            ctypes.memmove(ctypes.addressof(first), handle, 64)
        case "cudaIpcOpenMemHandle":
            pid, fd, nbytes = HANDLE.unpack_from(ctypes.string_at(ctypes.addressof(arguments[1]), 64))
            if pid == os.getpid():
                raise CudaError("cudaIpcOpenMemHandle failed: invalid device context (201)")
            first.value = _map(os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR), nbytes)
        case "cudaHostGetDevicePointer":
            first.value = arguments[1].value
        case "cudaEventCreateWithFlags":
            first.value = 1
        case _ if name not in IGNORED:
            raise NotImplementedError(name)


def call_driver(name: str, address: int, number: int) -> None:
    """Write a counter, or wait for it, as a stream does."""
    counter = ctypes.c_int64.from_address(address)
    if name.startswith("cuStreamWriteValue"):
        counter.value = number
        return
    deadline = time.monotonic() + DEADLINE
    while counter.value < number:
        if time.monotonic() > deadline:
            raise CudaError(f"{name}: a stream has waited for {number} for {DEADLINE:g} s")
        time.sleep(0.0002)


def capture(
    self: Graphs, function: Callable[[], Any], device: torch.device, restore: Callable[[], object]
) -> tuple[Callable[[], object], Any]:
    """Return a function that calls `function` again where a GPU replays a graph, and the tensors that it writes to."""
    output = function()
    restore()
    return make_replay(function, output), output


def install() -> None:
    """Replace CUDA's functions in this process."""
    as_tensor = torch.as_tensor

    def from_span(data: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(data, cuda._Span):
            return as_tensor(data, *arguments, **options)
        span: Any = data.__cuda_array_interface__
        address, nbytes = span["data"][0], span["shape"][0]
        return native.from_address(address, nbytes, torch.device(options["device"]).index)

    vars(torch)["as_tensor"] = from_span
    vars(cuda).update(_call_runtime=call_runtime, _call_driver=call_driver)
    Graphs._capture = capture  # type: ignore[method-assign]
