"""The workers of one leader, of all backends, and waiting for their messages."""

from __future__ import annotations

import os
import time

from drp.leader.devices import Device
from drp.leader.remote import RemoteWorkers
from drp.leader.supervision.local import LocalBackend
from drp.leader.supervision.remote import RemoteBackend
from drp.leader.supervision.worker import Worker, WorkerBackend
from drp.protocol.messages import ToLeader, WorkerFailed

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
        for fd in self.remote.descriptors if self.remote is not None else ():
            self.watch(fd)

    @property
    def dropped(self) -> int:
        """Number of messages dropped because they were malformed or from an unknown sender."""
        return sum(backend.dropped for backend in self._backends)

    def spawn(self, number: int, generation: int, device: Device) -> Worker:
        """Start a worker where its device is."""
        if device.remote is None:
            return self.local.start(number, generation, device)
        assert self.remote is not None
        return self.remote.start(number, generation, device)

    def watch(self, fd: int) -> None:
        """Make `poll` also return when this descriptor is ready."""
        self.local.socket.watch(fd)

    def sleep(self, deadline: float) -> set[int]:
        """Sleep until the deadline or until `poll` has work; return the ready descriptors. May return early."""
        return self.local.socket.sleep(deadline - time.monotonic())

    def poll(self, deadline: float, wakeup: int) -> tuple[Worker, ToLeader | None] | None:
        """Return the next message with its worker, or a worker that has ended, with None in place of the message.

        A worker's messages are returned before its end. Returns None at the deadline, and when the eventfd `wakeup` is
        ready, which is then reset.
        """
        # The descriptor of a ZeroMQ socket does not show messages that came while the socket was used for sending.
        if self.remote is not None and (got := self.remote.receive_now() or self.remote.find_ended(set())):
            return got
        has_message, ready = self.local.socket.poll(deadline - time.monotonic())
        if wakeup in ready:
            os.eventfd_read(wakeup)
        if (has_message or self.remote is not None) and (received := self.receive_now()):
            return received
        for backend in self._backends:
            if (ended := backend.find_ended(ready)) is not None:
                return ended
        return None

    def receive_now(self) -> tuple[Worker, ToLeader] | None:
        """Return a waiting message with its worker, or None. Malformed messages and unknown senders are dropped."""
        for backend in self._backends:
            if (got := backend.receive_now()) is not None:
                return got
        return None

    def close(self, grace: float = SHUTDOWN_TIMEOUT) -> None:
        """End all workers with Stop and, after `grace` seconds, with SIGKILL; free all memory and sockets."""
        if os.getpid() != self.owner:
            return  # In a forked child, the workers belong to the parent.
        for backend in reversed(self._backends):
            backend.close(grace)


def failure(worker: Worker, failed: WorkerFailed) -> str:
    """Describe the failure that a worker reported before it ended."""
    return f"{worker} failed {failed.activity}: {failed.error}\n{failed.traceback}"
