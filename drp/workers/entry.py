"""Entry: the first lines of a worker process. It sees to what must be so before torch is imported."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from dataclasses import dataclass

from drp.workers import lifeline


@dataclass(frozen=True)
class Config:
    """What a worker is told when it is started; the rest comes by message."""

    identity: bytes
    endpoint: str
    directory: str
    leader: int
    from_main_thread: bool
    last_words: str
    cores: tuple[int, ...]
    threads: int


def main(config: Config) -> None:
    """Run one worker until it is told to stop or its leader is gone."""
    words = os.open(config.last_words, os.O_RDWR | os.O_CLOEXEC)
    faulthandler.enable(words)  # A crash in native code leaves its stack there.
    try:
        lifeline.watch(config.leader, config.directory)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the leader decides.
        os.sched_setaffinity(0, config.cores)
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
        from drp.workers.worker import Worker  # only now: torch sizes its thread pool when imported

        Worker(config.endpoint, config.identity, config.threads, config.from_main_thread).run()
    except BaseException:
        os.write(words, traceback.format_exc().encode()[-4000:])
        sys.exit(1)
