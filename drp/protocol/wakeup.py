"""A pipe by which workers wake the leader. It carries no data: the state is in shared memory."""

from __future__ import annotations

import os

from drp.errors import ProtocolError
from drp.protocol.handles import PipeHandle


class WakeupReceiver:
    """The leader's end of the pipe: `fd` is readable after a notification, until it is read empty."""

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    @property
    def handle(self) -> PipeHandle:
        """What a worker needs to open its end."""
        return PipeHandle(os.getpid(), self._write_fd)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._write_fd)


class Wakeup:
    """A worker's end of the pipe, which it opens through /proc, like shared memory."""

    def __init__(self, end: PipeHandle) -> None:
        try:
            self._fd = os.open(f"/proc/{end.pid}/fd/{end.fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ProtocolError(f"the wake-up pipe of process {end.pid} cannot be opened: {error.strerror}") from error

    def notify(self) -> None:
        """Wake the leader. If the pipe is full, the leader is awake or gone, so the byte is dropped."""
        try:  # noqa: SIM105  # called for every draft
            os.write(self._fd, b"!")
        except (BlockingIOError, BrokenPipeError):
            pass

    def close(self) -> None:
        os.close(self._fd)
