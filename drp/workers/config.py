"""The configuration with which the leader starts a worker process. It imports no torch: a worker is pinned first."""

from __future__ import annotations

import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerConfig:
    """What the leader passes to the process of a worker; everything else comes by message.

    identity: the name of the worker, made of its number and its generation.
    listener: the socket on which the worker accepts the leader's connection.
    leader: the process ID of the leader, with which the worker ends.
    crash_log: a file in shared memory, into which a crash writes its stack or traceback.
    heartbeat_offset: where in that file the worker counts its heartbeats, a uint64.
    cores: the CPU cores to which the worker is pinned.
    threads: the number of torch threads.
    version: the major and minor version of the leader's Python, which must be the worker's too.
    main: the path of the main script, if the model is defined there.
    """

    identity: str
    listener: socket.socket
    leader: int
    crash_log: str
    heartbeat_offset: int
    cores: tuple[int, ...]
    threads: int
    version: tuple[int, ...]
    main: str | None
