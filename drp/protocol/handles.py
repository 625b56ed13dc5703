"""Handles by which one process opens memory and pipes of another, as messages contain them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from drp.protocol.codec import Bounds, Length

Count = Annotated[int, Bounds(0, 2**31 - 1)]
Bytes = Annotated[int, Bounds(0, 2**48)]
Name = Annotated[str, Length(200)]
Opaque = Annotated[bytes, Length(64)]


@dataclass(frozen=True)
class Handle:
    """Shared memory: descriptor `fd` of the process `pid`, `nbytes` long."""

    pid: Count
    fd: Count
    nbytes: Bytes


@dataclass(frozen=True)
class PipeHandle:
    """The writing end of a pipe: descriptor `fd` of the process `pid`."""

    pid: Count
    fd: Count


@dataclass(frozen=True)
class GpuHandle:
    """Memory of a GPU that is shared by CUDA IPC. Anyone with the handle can access the memory, so it is never logged.

    device: the UUID of the GPU.
    memory: the result of cudaIpcGetMemHandle.
    event: the result of cudaIpcGetEventHandle for the owner's event, which is recorded before each message that asks to
        read the memory.
    """

    device: Name
    nbytes: Bytes
    memory: Opaque
    event: Opaque
