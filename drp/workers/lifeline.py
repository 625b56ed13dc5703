"""Lifeline: a worker ends with its leader, however the leader ends and whatever the worker is doing."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import threading

PR_SET_PDEATHSIG = 1
LEADER_GONE = 3
"""Exit status of a worker that found its leader dead."""


def watch(leader: int, lifeline: int, directory: str) -> None:
    """End this process when process `leader` is gone, after removing the socket's directory, should it still be there.

    `lifeline` is a descriptor that is readable then. A thread of its own sees to it, whatever the main thread is doing.
    """
    threading.Thread(target=_watch, args=(leader, lifeline, directory), name="watch-leader", daemon=True).start()


def _watch(leader: int, lifeline: int, directory: str) -> None:
    end = select.poll()
    end.register(lifeline, select.POLLIN)
    while os.getppid() == leader and not end.poll(500):
        continue
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(LEADER_GONE)


def die_with_parent_thread() -> None:
    """Have the kernel kill this process with the thread that started it: it ends even a stopped process.

    Only for workers that the leader's main thread started: another thread may end long before its process.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
