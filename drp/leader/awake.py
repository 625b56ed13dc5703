"""Awake: while runs are under way, no core of the machine falls asleep, so that nobody has to be woken up slowly.

The kernel lets cores sleep as deeply as the shortest time allows that anyone wishes for in /dev/cpu_dma_latency, and a
wish ends when the file is closed, however its process ends (Linux: Documentation/power/pm_qos_interface.rst).
"""

from __future__ import annotations

import logging
import os
import struct

PATH = "/dev/cpu_dma_latency"

log = logging.getLogger(__name__)


class Awake:
    """The wish that waking up takes no time at all, while it is held; nothing, if it is not wanted.

    Raises ValueError if this process may not wish so.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted, self._fd = wanted, -1
        if wanted and (why := why_not()):
            raise ValueError(f"awake=True needs {PATH}, which cannot be written: {why}")

    @property
    def held(self) -> bool:
        """Whether it is."""
        return self._fd >= 0

    def hold(self) -> None:
        """Keep the cores awake from now on, unless there is no descriptor for it now: the run is as right without."""
        if self._wanted and self._fd < 0:
            try:
                self._fd = os.open(PATH, os.O_WRONLY | os.O_CLOEXEC)
                os.write(self._fd, struct.pack("i", 0))
            except OSError as error:
                log.warning("the cores are not kept awake: %s", error)

    def release(self) -> None:
        """Let them sleep again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def why_not() -> str:
    """Say why cores cannot be kept awake here, and what to do; empty if they can."""
    try:
        os.close(os.open(PATH, os.O_WRONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        return "this kernel or container does not show it; give the container the device, or leave awake out"
    except OSError as error:
        return f'{error.strerror}; be root, or let udev give it to a group (KERNEL=="cpu_dma_latency", MODE="0660")'
    return ""
