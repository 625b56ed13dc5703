"""Ending a worker with its leader, however the leader ends and whatever the worker is doing."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1
LEADER_GONE = 3
"""Exit status of a worker that found its leader dead."""


def kill_with_parent(leader: int) -> None:
    """Have the kernel kill this process with the thread of process `leader` that started it, even if it is stopped."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != leader:  # It went before it was asked.
        os._exit(LEADER_GONE)
