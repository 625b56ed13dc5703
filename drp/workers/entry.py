"""The entry point of a worker process, which prepares the process before torch is imported."""

from __future__ import annotations

import atexit
import faulthandler
import itertools
import mmap
import multiprocessing.spawn
import os
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from drp.frozen_imports import frozen_imports
from drp.workers import parent_death
from drp.workers.config import WorkerConfig


def main(config: WorkerConfig) -> None:
    """Run a worker until it receives Stop or its leader ends."""
    parent_death.kill_with_parent(config.leader)
    crash_log = os.open(config.crash_log, os.O_RDWR | os.O_CLOEXEC)
    faulthandler.enable(crash_log)  # A crash in native code leaves its stack there.
    try:
        for number in (signal.SIGINT, signal.SIGTERM):  # They reach the whole group, from a terminal or a supervisor:
            signal.signal(number, signal.SIG_IGN)  # the leader decides.
        os.sched_setaffinity(0, config.cores)
        if sys.version_info[:2] != tuple(config.version):
            wanted = ".".join(map(str, config.version))
            raise RuntimeError(
                f"{sys.executable} is not the Python {wanted} that the leader runs; give its path as python="
            )
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
        with frozen_imports():  # Only now: torch sizes its thread pool when imported.
            from drp.protocol.messages import VERSION, Hello
            from drp.protocol.transport import WorkerSocket
            from drp.workers.worker import Worker
        if config.main is not None:
            _import_main(config.main)
        socket = WorkerSocket(config.listener.detach(), config.leader)
        heartbeat = _heartbeat(crash_log, config.heartbeat_offset)
        Worker(socket, Hello(VERSION, os.getpid()), config.threads, heartbeat).run()
        end()
    except BaseException:
        os.write(crash_log, traceback.format_exc().encode()[-4000:])
        sys.exit(1)


def end() -> NoReturn:
    """End without the interpreter's finalization, which takes 0.4 s with torch; exit handlers of models are called.

    The kernel frees memory, descriptors and devices, as it does when a worker is killed.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _heartbeat(file: int, offset: int) -> Callable[[], None]:
    """Return a function that counts heartbeats in a file of shared memory, a uint64 at this offset."""
    memory, heartbeats = mmap.mmap(file, 0), itertools.count(1)
    return lambda: struct.pack_into("Q", memory, offset, next(heartbeats))


def _import_main(path: str) -> None:
    """Run the main script under the name that multiprocessing uses in children, and make it `__main__`."""
    process = multiprocessing.current_process()
    process._inheriting = True  # type: ignore[attr-defined]  # so that what it must not start refuses, as in any child
    multiprocessing.spawn.import_main_path(path)
    del process._inheriting  # type: ignore[attr-defined]  # private to multiprocessing
