"""Waiting: of a thread, for a number that another process writes, and for a time.

A number in shared memory can be slept on with Linux's futex, in any process that maps it: nothing is sent, no socket is
read, and whoever has written it wakes all who wait with one call.
"""

from __future__ import annotations

import ctypes
import platform
import select
import time
from typing import Any, Final

import numpy as np
import numpy.typing as npt

FUTEX: Final = 202 if platform.machine() == "x86_64" else 98  # of all that have come to Linux since
WAIT, WAKE, ALL = 0, 1, 2**31 - 1
SET_TIMER_SLACK: Final = 29

_libc: Any = ctypes.CDLL(None)
_libc.ppoll.argtypes = (ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p)
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Number:
    """One of the int64 in `line`, which several processes map; its lower half is what is slept on."""

    def __init__(self, line: npt.NDArray[np.int64], place: int) -> None:
        self._line, self._place = line, place
        half = 0 if line.dtype.byteorder in "=<" and np.little_endian else 4
        self._address = line.ctypes.data + 8 * place + half

    @property
    def value(self) -> int:
        """What it is now."""
        return int(self._line[self._place])

    def write(self, value: int) -> None:
        """Write it, and wake those that wait for it."""
        self._line[self._place] = value
        self.wake()

    def wake(self) -> None:
        """Have those that wait for it look at whatever else they look at."""
        _libc.syscall(FUTEX, self._address, WAKE, ALL, None)

    def wait(self, value: int, seconds: float) -> None:
        """Sleep while it is `value`, at most; it may also end before."""
        least = ctypes.byref(_Timespec(int(seconds), int(seconds % 1 * 1e9)))
        _libc.syscall(FUTEX, self._address, WAIT, value & 0xFFFFFFFF, least)


class _Pollfd(ctypes.Structure):
    _fields_ = (("fd", ctypes.c_int), ("events", ctypes.c_short), ("revents", ctypes.c_short))


def wait_readable(fd: int, seconds: float) -> None:
    """Sleep until something is to be read, at most; poll and epoll count whole milliseconds. It may also end before."""
    what, most = _Pollfd(fd, select.POLLIN), _Timespec(int(seconds), int(seconds % 1 * 1e9))
    _libc.ppoll(ctypes.byref(what), 1, ctypes.byref(most), None)


def sleep_until(deadline: float) -> float:
    """Sleep until `time.perf_counter()` reaches `deadline`; return what it then is."""
    while (left := deadline - time.perf_counter()) > 0:
        time.sleep(left)
    return time.perf_counter()


def be_punctual() -> None:
    """Let the kernel end this thread's sleeps when they are over: else it may be 50 us late, to save power."""
    _libc.prctl(SET_TIMER_SLACK, 1)
