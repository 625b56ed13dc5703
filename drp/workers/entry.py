"""Entry: the first lines of a worker process. It sees to what must be so before torch is imported."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import select
import shutil
import signal
import sys
import threading
import traceback
from dataclasses import dataclass

PR_SET_PDEATHSIG = 1
LEADER_GONE = 3
"""Exit status of a worker that found its leader dead."""


@dataclass(frozen=True)
class Config:
    """What a worker is told when it is started; the rest comes by message."""

    identity: bytes
    endpoint: str
    directory: str
    leader: int
    die_with_thread: bool
    last_words: str
    cores: tuple[int, ...]
    threads: int


def main(config: Config) -> None:
    """Run one worker until it is told to stop or its leader is gone."""
    words = os.open(config.last_words, os.O_RDWR | os.O_CLOEXEC)
    faulthandler.enable(words)  # A crash in native code leaves its stack there.
    try:
        _tie_to_leader(config)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the leader decides.
        os.sched_setaffinity(0, config.cores)
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
        from drp.workers.worker import Worker  # only now: torch sizes its thread pool when imported

        Worker(config.endpoint, config.identity, config.threads).run()
    except BaseException:
        os.write(words, traceback.format_exc().encode()[-4000:])
        sys.exit(1)


def _tie_to_leader(config: Config) -> None:
    """See that this process ends with its leader, however that ends and whatever this one is doing."""
    if config.die_with_thread:
        # The kernel's own way, which also ends a stopped process. It goes by the thread that started this process, so
        # it is asked for only when that is the leader's main thread.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch_leader, args=(config,), name="watch-leader", daemon=True).start()


def _watch_leader(config: Config) -> None:
    parent = multiprocessing.parent_process()
    sentinel = [parent.sentinel] if parent is not None else []
    while os.getppid() == config.leader:
        if select.select(sentinel, [], [], 0.5)[0]:
            break
    shutil.rmtree(config.directory, ignore_errors=True)
    os._exit(LEADER_GONE)
