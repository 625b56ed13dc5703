"""Waiting for a number that another process writes, for a file descriptor, and for a time.

With Linux's futex, any process that maps a number in shared memory can sleep until it changes. The process that writes
the number wakes all sleepers with one system call; no message is sent.
"""

from __future__ import annotations

import ctypes
import platform
import select
import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt

SYS_FUTEX: Final = 202 if platform.machine() == "x86_64" else 98  # of all that have come to Linux since
WAIT, WAKE, ALL = 0, 1, 2**31 - 1
PR_SET_TIMERSLACK: Final = 29

_libc: Any = ctypes.CDLL(None)
_libc.ppoll.argtypes = (ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p)
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Futex:
    """A futex on the lower half of one int64 of `array`, which several processes map."""

    def __init__(self, array: npt.NDArray[np.int64], place: int) -> None:
        half = 0 if array.dtype.byteorder in "=<" and np.little_endian else 4
        self._array, self._address = array, array.ctypes.data + 8 * place + half

    def wake(self) -> None:
        _libc.syscall(SYS_FUTEX, self._address, WAKE, ALL, None)

    def wait(self, value: int, seconds: float) -> None:
        """Sleep while the number is `value`, for at most `seconds`; spurious returns are possible."""
        least = ctypes.byref(_Timespec(int(seconds), int(seconds % 1 * 1e9)))
        _libc.syscall(SYS_FUTEX, self._address, WAIT, value & 0xFFFFFFFF, least)


class _Pollfd(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


def wait_readable(fd: int, seconds: float) -> None:
    """Sleep until `fd` is readable, for at most `seconds`, to the nanosecond: poll and epoll count milliseconds."""
    what, most = _Pollfd(fd, select.POLLIN), _Timespec(int(seconds), int(seconds % 1 * 1e9))
    _libc.ppoll(ctypes.byref(what), 1, ctypes.byref(most), None)


def sched_yield() -> None:
    """Yield the core to other threads; the interpreter's lock is released meanwhile."""
    _libc.sched_yield()


def sleep_until(deadline: float) -> float:
    """Sleep until `time.perf_counter()` reaches `deadline`; return the time of waking up."""
    while (left := deadline - time.perf_counter()) > 0:
        time.sleep(left)
    return time.perf_counter()


def set_timer_slack() -> None:
    """Set this thread's timer slack to 1 ns; by default sleeps may end 50 us late, to save power."""
    _libc.prctl(PR_SET_TIMERSLACK, 1)
