"""Transport: the leader's and the worker's socket, over ipc:// at a place that only their user can reach.

A socket belongs to one thread at a time. Every receive has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import tempfile
import time
from collections import deque
from pathlib import Path

import zmq

from drp.protocol.codec import MAX_MESSAGE, ProtocolError, decode, encode
from drp.protocol.messages import TO_LEADER, TO_WORKER, ToLeader, ToWorker
from drp.protocol.waiting import give_way, wait_readable

MAX_PATH = 107
"""Characters of the longest path of a Unix socket."""

LONGEST = 3600.0
"""Seconds of one wait of the leader's, which may have no deadline."""

BACKLOG = 64
"""Messages from one worker that wait to be taken; a worker that sends more waits itself."""

MAX_FROM_WORKER = 1 << 18
"""Bytes of the longest message from a worker: one that is longer ends its connection."""


class LeaderSocket:
    """A ROUTER: a worker is addressed by the identity it connected with.

    It has no name in any file system: it is bound in a directory of its owner's, held open, and its name removed at
    once. `endpoint` leads there through /proc, which lets nobody in but the owner, and nothing is left of it when the
    process is gone, however it went.
    """

    def __init__(self) -> None:
        directory = Path(tempfile.mkdtemp(prefix="drp-"))  # for its owner alone (mode 0700)
        path = directory / "leader"
        self._place = -1
        # A context of its own: an embedding program's sockets and limits stay out of it.
        self._context = zmq.Context(io_threads=1)
        self._epoll = select.epoll()
        try:
            if len(str(path)) > MAX_PATH:
                raise ValueError(f"{path} is longer than a socket path's {MAX_PATH} characters; set TMPDIR to less")
            self._socket = self._context.socket(zmq.ROUTER)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.RCVHWM, BACKLOG)
            self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FROM_WORKER)
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # Sending to a worker that is gone is an error.
            self._socket.bind(f"ipc://{path}")
            self._place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            self.endpoint = f"ipc:///proc/{os.getpid()}/fd/{self._place}"
            self._epoll.register(self._socket.fileno(), select.EPOLLIN)
        except BaseException:
            self.close()
            raise
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def send(self, identity: bytes, *messages: ToWorker | bytes) -> None:
        """Send at once, several together: the worker wakes up once. Some may be encoded already.

        Raises zmq.ZMQError if the worker is gone or does not take its messages.
        """
        frames = [message if isinstance(message, bytes) else encode(message) for message in messages]
        self._socket.send_multipart([identity, *frames], zmq.NOBLOCK)

    def watch(self, fd: int) -> None:
        """Let `poll` also look at a file descriptor."""
        self._epoll.register(fd, select.EPOLLIN)

    def forget(self, fd: int) -> None:
        """Look at a file descriptor no longer."""
        self._epoll.unregister(fd)

    def sleep(self, seconds: float) -> set[int]:
        """Sleep until there is a message or a watched descriptor is ready, at most; it may also end before.

        Return which are, the socket's own too.
        """
        if self._has_message():
            return {self._socket.fileno()}
        if seconds > 0:
            wait_readable(self._epoll.fileno(), min(seconds, LONGEST))
        return self._ready()

    def _ready(self) -> set[int]:
        return {fd for fd, _ in self._epoll.poll(0.0)}

    def poll(self, seconds: float) -> tuple[bool, set[int]]:
        """Wait for a message or a watched descriptor; return whether there is a message, and which are ready."""
        # One epoll for all: zmq's own poll makes its list anew at each call, and counts whole milliseconds.
        deadline, own = time.monotonic() + seconds, self._socket.fileno()
        while True:
            message = self._has_message()
            if not message and (left := deadline - time.monotonic()) > 0:
                wait_readable(self._epoll.fileno(), min(left, LONGEST))
            ready = self._ready()
            if message or ready - {own} or (not ready and time.monotonic() >= deadline):
                return message or self._has_message(), ready - {own}

    def _has_message(self) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def wait(self, seconds: float) -> None:
        """Wait for a message, at most."""
        if not self._has_message():
            self._epoll.poll(seconds)

    def receive(self) -> tuple[bytes, ToLeader]:
        """Return a waiting message and who sent it; raise ProtocolError if it is none, zmq.Again if none waits."""
        identity, *parts = self._socket.recv_multipart(zmq.NOBLOCK)
        if len(parts) != 1:
            raise ProtocolError(f"{len(parts)} frames; a message is one")
        return identity, decode(parts[0], TO_LEADER)

    def close(self) -> None:
        """Close; nothing unsent is waited for."""
        self._epoll.close()
        self._context.destroy(linger=0)
        if self._place >= 0:
            os.close(self._place)
            self._place = -1


class WorkerSocket:
    """A DEALER connected to a leader's endpoint."""

    def __init__(self, endpoint: str, identity: bytes) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity)
        self._socket.setsockopt(zmq.LINGER, 1000)  # A last Failed has a second to leave.
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        self._socket.connect(endpoint)
        self._patience = -1.0
        self._came: deque[bytes] = deque()

    def send(self, message: ToLeader) -> None:
        """Send at once."""
        self._socket.send(encode(message), zmq.NOBLOCK)

    def receive(self, seconds: float, awake: float = 0.0) -> ToWorker | None:
        """Return the next message, or None if none came in time; for some of the seconds this thread stays awake."""
        until = time.perf_counter() + awake
        while not self._came and time.perf_counter() < until:
            self._take(0.0)
            give_way()
        if not self._came:
            self._take(seconds)
        return decode(self._came.popleft(), TO_WORKER) if self._came else None

    def _take(self, seconds: float) -> None:
        """Take what came together, if something comes in time."""
        if seconds and seconds != self._patience:
            self._patience = seconds
            self._socket.setsockopt(zmq.RCVTIMEO, round(seconds * 1000))
        with contextlib.suppress(zmq.Again):
            self._came.extend(self._socket.recv_multipart(0 if seconds else zmq.NOBLOCK))

    def close(self) -> None:
        """Close; what was sent last has a moment to leave."""
        self._socket.close()
        self._context.term()
