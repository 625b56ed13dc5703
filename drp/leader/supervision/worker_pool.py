"""The workers of one leader, of all backends, and waiting for their messages."""

from __future__ import annotations

import os
import time

from drp.leader.devices import Device
from drp.leader.remote import RemoteWorkers
from drp.leader.supervision.local import LocalBackend
from drp.leader.supervision.remote import RemoteBackend
from drp.leader.supervision.worker import Received, WorkerBackend, WorkerHandle
from drp.protocol.messages import WorkerFailed

SHUTDOWN_TIMEOUT = 2.0
"""Seconds that a worker has to exit after Stop, before it is killed."""


class WorkerPool:
    """The workers of one leader, which `close` ends.

    Only one thread may use it. That thread must live as long as the workers, which end with it.

    remote: describes the workers on other machines, if there are any.
    """

    def __init__(
        self,
        model: str,
        threads: int,
        python: str | os.PathLike[str] | None = None,
        remote: RemoteWorkers | None = None,
    ) -> None:
        self.owner = os.getpid()
        self.remote = RemoteBackend(remote) if remote is not None else None
        try:
            self.local = LocalBackend(model, threads, python)
        except BaseException:
            if self.remote is not None:
                self.remote.close(0.0)
            raise
        self._backends: tuple[WorkerBackend, ...] = (self.local,) if self.remote is None else (self.local, self.remote)
        self._wakeups: set[int] = set()
        for fd in self.remote.descriptors if self.remote is not None else ():
            self.local.socket.watch(fd)

    @property
    def dropped(self) -> int:
        """Number of messages dropped because they were malformed or from an unknown sender."""
        return sum(backend.dropped for backend in self._backends)

    def spawn(self, number: int, generation: int, device: Device) -> WorkerHandle:
        if device.remote is None:
            return self.local.start(number, generation, device)
        assert self.remote is not None
        return self.remote.start(number, generation, device)

    def watch_wakeup(self, fd: int) -> None:
        """Make `receive` also return when this descriptor, an eventfd or a pipe, is ready; it is then emptied."""
        self.local.socket.watch(fd)
        self._wakeups.add(fd)

    def receive(self, deadline: float) -> tuple[list[Received], set[int]]:
        """Wait for messages and the ends of workers until the deadline. May return early.

        Returns:
            The messages with their workers, and the workers that have ended with None in place of a message, a worker's
            messages before its end; and the wake-up descriptors that were ready.
        """
        # The descriptors of the remote workers' sockets do not show what came while these were used for sending.
        received = self.remote.receive(set()) if self.remote is not None else []
        ready = self.local.socket.sleep(0.0 if received else deadline - time.monotonic())
        for backend in self._backends:
            received += backend.receive(ready)
        wakeups = ready & self._wakeups
        for fd in wakeups:
            os.read(fd, 4096)
        return received, wakeups

    def close(self, grace: float = SHUTDOWN_TIMEOUT) -> None:
        """End all workers with Stop and, after `grace` seconds, with SIGKILL; free all memory and sockets."""
        if os.getpid() != self.owner:
            return  # In a forked child, the workers belong to the parent.
        for backend in reversed(self._backends):
            backend.close(grace)


def failure(worker: WorkerHandle, failed: WorkerFailed) -> str:
    """Describe the failure that a worker reported before it ended."""
    return f"{worker} failed {failed.activity}: {failed.error}\n{failed.traceback}"
