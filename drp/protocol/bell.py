"""Bell: a pipe of the leader's, by which workers wake it. Nothing is said in it: who wakes up looks at the memory."""

from __future__ import annotations

import contextlib
import os

from drp.protocol.codec import ProtocolError
from drp.protocol.messages import End


class OwnBell:
    """The leader's end: `fd` is ready when somebody rang."""

    def __init__(self) -> None:
        self.fd, self._end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    @property
    def end(self) -> End:
        """What a worker needs to ring it."""
        return End(os.getpid(), self._end)

    def quiet(self) -> None:
        """Let it be silent until somebody rings again."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.fd, 4096)

    def close(self) -> None:
        """Close both ends."""
        os.close(self.fd)
        os.close(self._end)


class Bell:
    """A worker's: it opens the pipe through /proc, like memory."""

    def __init__(self, end: End) -> None:
        try:
            self._fd = os.open(f"/proc/{end.pid}/fd/{end.fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise ProtocolError(f"the bell of process {end.pid} cannot be opened: {error.strerror}") from error

    def ring(self) -> None:
        """Wake the leader; one that was rung so often that the pipe is full is awake, or gone."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._fd, b"!")

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)
