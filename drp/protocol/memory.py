"""Shared memory: anonymous files (memfd), owned by the leader and opened by the workers through /proc.

A memfd has no name in any file system. The kernel frees it when its owner and all openers have ended.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import math
import mmap
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from drp.errors import ProtocolError
from drp.protocol.frames import ITEM_SIZES
from drp.protocol.handles import GpuHandle, Handle
from drp.protocol.memfd import open_memfd

ALIGNMENT: Final = 256
"""The alignment of every tensor in bytes, that of torch's own allocations. cuBLASLt chooses its algorithms by it, so a
tensor in an arena gives the same bits as one in torch's memory."""

DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in ITEM_SIZES}
NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

MAX_RETAINED_NBYTES: Final = 64 << 20
"""Maximum size of memory that a worker keeps mapped for later runs."""
REMEDIES: Final = {errno.EMFILE: "; see ulimit -n", errno.EFBIG: "; see ulimit -f", errno.ENOMEM: "; ask for fewer"}
"""What to do about an error of the operating system, by its number."""
CHECKED_NBYTES: Final = 16 << 20
"""Allocations of this size and more are compared with the memory that the machine has left."""


GET_DUMPABLE: Final = 3
"""An option of prctl (linux/prctl.h)."""
CAP_SYS_PTRACE: Final = 19
"""The capability's number (linux/capability.h)."""


def aligned(nbytes: int) -> int:
    """Round up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def check_fit(offset: int, shape: Sequence[int], dtype: torch.dtype, nbytes: int) -> int:
    """Return the number of elements of a tensor; raise ProtocolError if it does not fit in `nbytes` bytes."""
    count = math.prod(shape)
    if offset % ALIGNMENT or offset < 0 or offset + count * dtype.itemsize > nbytes:
        raise ProtocolError(f"a tensor {list(shape)} of {dtype} at {offset} is not within {nbytes} bytes")
    return count


def available_nbytes() -> int:
    """Return how many bytes the machine can still allocate, swap space included; very many if it does not say."""
    numbers = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    if "MemAvailable" not in numbers:
        return sys.maxsize
    return 1024 * (int(numbers["MemAvailable"]) + int(numbers.get("SwapFree", 0)))


def require_openable() -> None:
    """Raise PermissionError if the kernel keeps the peers of this process from opening its memory through /proc.

    It does so for a process that is not dumpable (Linux: proc(5), prctl(2)), unless they have CAP_SYS_PTRACE.
    """
    status = Path("/proc/self/status").read_text()
    capabilities = int(re.findall(r"^CapEff:\s*([0-9a-f]+)", status, re.MULTILINE)[0], 16)
    if ctypes.CDLL(None).prctl(GET_DUMPABLE) != 1 and not capabilities >> CAP_SYS_PTRACE & 1:
        raise PermissionError(
            "this process is not dumpable, as one that has changed its user (setuid), so no other may open its memory "
            "through /proc; start it as the user that it is to be, or call prctl(PR_SET_DUMPABLE, 1) after the change"
        )


class Memory(Protocol):
    """The interface of the memory of an arena, on the host or on a GPU.

    The owner calls `record_event` before it tells a peer to read, and the peer calls `wait_event` before it reads. On
    the host both do nothing, because writes are complete when the call returns. A peer waits for its own work before it
    answers.
    """

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        ...

    @property
    def device(self) -> torch.device:
        """The device, with the index that it has in this process."""
        ...

    @property
    def ipc_handles(self) -> tuple[Handle | None, GpuHandle | None]:
        """The handle with which a peer opens the memory: one of the two is None."""
        ...

    @property
    def number(self) -> int:
        """A number unique among the owner's memory, if handles can be reused for other memory; else 0."""
        ...

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a view; raise ProtocolError if it does not fit."""
        ...

    def record_event(self) -> None:
        """Record an event after what this process has queued so far."""
        ...

    def wait_event(self) -> None:
        """Make what this process queues from now on wait for the event as the owner last recorded it."""
        ...

    def close(self, reuse: bool = True) -> None:
        """Release the memory. `reuse`: no process writes to it any more, so it may be used again."""
        ...


class LocalMemory:
    """Memory of this process alone, on any device."""

    ipc_handles: Final = (None, None)
    number: Final = 0

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes, self.device = nbytes, device
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = check_fit(offset, shape, dtype, self.nbytes)
        return self.bytes[offset : offset + count * dtype.itemsize].view(dtype).view(tuple(shape))

    def record_event(self) -> None:
        """Do nothing: no other process reads it."""

    def wait_event(self) -> None:
        """Do nothing: no other process writes it."""

    def close(self, reuse: bool = True) -> None:
        """Do nothing: it goes with its last tensor."""


Keep = Callable[["SharedMemory"], bool]
_numbers = itertools.count()


class SharedMemory:
    """A block of shared memory. It stays mapped as long as a tensor in it exists."""

    device: Final = torch.device("cpu")

    def __init__(self, fd: int, nbytes: int, keep: Keep | None = None, private: bool = False) -> None:
        self._fd, self._keep = fd, keep
        self._map = mmap.mmap(fd, nbytes, access=mmap.ACCESS_COPY if private else mmap.ACCESS_WRITE)
        self._exported = False
        self.nbytes = nbytes
        self.number = 1 + next(_numbers) % (2**31 - 1) if keep is not None else 0
        """It is used again if it is kept; a descriptor's number may come to be another memory's."""

    @classmethod
    def create(cls, nbytes: int, keep: Keep | None = None) -> SharedMemory:
        """Allocate zeroed memory of at least one page. Its size is sealed, so that no peer can shrink it.

        `keep` is called when the memory is closed; if it returns True, it has kept the memory for reuse. Such memory is
        called drp-run in /proc/PID/fd, other memory drp.
        """
        nbytes = max(nbytes, mmap.PAGESIZE)
        try:
            _check_available(nbytes)
            fd = os.memfd_create("drp" if keep is None else "drp-run", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise _no_memory(nbytes, error) from error
        try:
            # Reserve now: a limit of the process or its container is reached here, not by a signal at the first write.
            os.posix_fallocate(fd, 0, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, nbytes, keep)
        except OSError as error:
            os.close(fd)
            raise _no_memory(nbytes, error) from error

    @classmethod
    def open(cls, handle: Handle, private: bool = False) -> SharedMemory:
        """Map a peer's memory; raise ProtocolError if it does not match its handle.

        With `private`, pages are copied on write, so that other processes do not see what this process writes.
        """
        fd = open_memfd(handle)
        try:
            return cls(fd, handle.nbytes, private=private)
        except OSError:
            os.close(fd)
            raise

    @property
    def handle(self) -> Handle:
        return Handle(os.getpid(), self._fd, self.nbytes)

    @property
    def ipc_handles(self) -> tuple[Handle | None, GpuHandle | None]:
        return self.handle, None

    def record_event(self) -> None:
        """Do nothing, since writes are complete when they return."""

    def wait_event(self) -> None:
        """Do nothing, since the owner's writes were complete before its message."""

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = check_fit(offset, shape, dtype, self.nbytes)
        if count == 0:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        self._exported = True
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(tuple(shape))

    def view(self) -> mmap.mmap:
        return self._map

    def read(self) -> bytes:
        return self._map[:]

    def close(self, reuse: bool = True) -> None:
        """Close the descriptor, after which no process can open the memory. Its pages are freed with the last tensor.

        With `reuse`, which requires that no process writes to the memory any more, it may be kept for reuse instead.
        """
        if self._fd >= 0 and not (reuse and self._keep is not None and self._keep(self)):
            os.close(self._fd)
            self._fd = -1
            if not self._exported:  # Else the mapping goes with the last tensor, which does not stop mmap from closing.
                self._map.close()


def _check_available(nbytes: int) -> None:
    """Raise MemoryError if the machine lacks this much: the kernel would grant it, and kill processes to make room."""
    if nbytes >= CHECKED_NBYTES and nbytes > (available := available_nbytes()):
        raise MemoryError(f"no {nbytes} bytes of shared memory: the machine has {available} left; ask for fewer")


def _no_memory(nbytes: int, error: OSError) -> MemoryError:
    remedy = REMEDIES.get(error.errno or 0, "")
    return MemoryError(f"no {nbytes} bytes of shared memory: {error}{remedy}")
