"""The sockets of leader and worker, over ipc:// at paths that only their user can access.

A socket belongs to one thread at a time. Every receive has a deadline.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import zmq

from drp.protocol.codec import MAX_MESSAGE, decode, encode
from drp.protocol.frames import Frame
from drp.protocol.messages import TO_WORKER, ToLeader, ToWorker
from drp.protocol.waiting import sched_yield, wait_readable

MAX_PATH = 107
"""Maximum length of the path of a Unix socket."""

MAX_WAIT = 3600.0
"""Maximum duration of one wait in seconds, since a deadline may be infinite."""

MAX_QUEUED = 64
"""Maximum number of unread messages from one worker; a worker that sends more has to wait."""

MAX_FROM_WORKER = 1 << 18
"""Maximum size of a message from a worker in bytes; a longer one ends the connection."""


NOBLOCK, SEND_MORE, POLLIN = int(zmq.NOBLOCK), int(zmq.SNDMORE), int(zmq.POLLIN)
"""Flags as plain numbers: combining pyzmq's enumerations takes several Python calls each time."""

_send = zmq.backend.Socket.send
"""Sending without the layer that pyzmq adds for kinds of sockets that are not used here."""

DESCRIPTORS = 16
"""Descriptors that must be free before a context is created, since libzmq aborts if it gets none for its threads."""

NAME = "worker"
"""The file name of a worker's socket, which exists only while the socket is created."""

FIRST = 300.0
"""Seconds that a worker waits for the leader to connect, which may be delayed by a lack of descriptors."""


def send_frames(socket: zmq.Socket[bytes], frames: Sequence[Frame], flags: int = NOBLOCK) -> None:
    """Send the frames of one message, of which libzmq makes copies; raise zmq.ZMQError if it is not accepted.

    pyzmq can also send without a copy. It then frees each frame in a separate thread, which competes with this thread
    for the interpreter's lock: that costs more than copying drafts does.
    """
    for frame in frames[:-1]:
        _send(socket, frame, flags | SEND_MORE)
    _send(socket, frames[-1], flags)


def receive_frames(socket: zmq.Socket[bytes], flags: int = NOBLOCK) -> list[zmq.Frame]:
    """Return the frames of the next message; raise zmq.Again if there is none."""
    frames = [socket.recv(flags, copy=False)]
    while frames[-1].more:
        frames.append(socket.recv(flags, copy=False))
    return frames


def has_message(socket: zmq.Socket[bytes]) -> bool:
    """Return whether a message can be received."""
    return bool(zmq.zmq_poll([(socket, POLLIN)], 0))  # getsockopt(EVENTS) creates enumerations


class LeaderSocket:
    """A ROUTER that connects to one listening socket for each worker, and addresses the worker by its identity.

    The leader creates the listening socket and its worker inherits it, so that the leader accepts no connections:
    libzmq aborts if it has no descriptor for a connection that it accepts, but retries one that it opens.

    The sockets have no name in any file system: each is bound in a private directory, and its name is removed at once.
    It is reached through /proc, which only its owner may use, and disappears with the process.
    """

    def __init__(self) -> None:
        require_descriptors(DESCRIPTORS)
        self._places: dict[bytes, int] = {}
        # A separate context, which does not share sockets and limits with an embedding program.
        self._context = zmq.Context(io_threads=1)
        self._epoll = select.epoll()
        try:
            self._socket = self._context.socket(zmq.ROUTER)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.RCVHWM, MAX_QUEUED)
            self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FROM_WORKER)
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # Sending to a worker that is gone is an error.
            self._socket.setsockopt(zmq.HANDSHAKE_IVL, 0)  # A worker answers once it has imported what it needs.
            self._items = [(self._socket, POLLIN)]  # for zmq_poll
            self._epoll.register(self._socket.fileno(), select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def invite(self, identity: bytes) -> socket.socket:
        """Return a listening socket for a worker to inherit, and connect to it; OSError if there is no descriptor."""
        directory = Path(tempfile.mkdtemp(prefix="drp-"))  # for its owner alone (mode 0700)
        try:
            listener, self._places[identity] = _listen(directory)
        finally:  # without shutil.rmtree, which takes a descriptor
            with contextlib.suppress(OSError):
                (directory / NAME).unlink()
            directory.rmdir()
        self._socket.setsockopt(zmq.CONNECT_ROUTING_ID, identity)
        self._socket.connect(self.endpoint(identity))
        return listener

    def endpoint(self, identity: bytes) -> str:
        """Return the address at which a worker listens."""
        return f"ipc:///proc/{os.getpid()}/fd/{self._places[identity]}"

    def dismiss(self, identity: bytes) -> None:
        """Disconnect from a worker and discard messages that it has not received."""
        if identity in self._places:
            with contextlib.suppress(zmq.ZMQError):  # It was not connected.
                self._socket.disconnect(self.endpoint(identity))
            os.close(self._places.pop(identity))

    def send(self, identity: bytes, *messages: Frame) -> None:
        """Send encoded messages together, so that the worker wakes up once.

        Raises zmq.ZMQError if the worker is gone or its queue is full.
        """
        _send(self._socket, identity, NOBLOCK | SEND_MORE)
        for message in messages[:-1]:
            _send(self._socket, message, NOBLOCK | SEND_MORE)
        _send(self._socket, messages[-1], NOBLOCK)

    def watch(self, fd: int) -> None:
        """Make `poll` also wait for a file descriptor."""
        self._epoll.register(fd, select.EPOLLIN)

    def forget(self, fd: int) -> None:
        self._epoll.unregister(fd)

    def sleep(self, seconds: float) -> set[int]:
        """Sleep until there is a message or a watched descriptor is ready, for at most `seconds`. May return early.

        Returns the ready descriptors, of which the socket's own may be one. It does not show messages that arrived
        while the socket was used.
        """
        # One epoll for all: zmq's own poll makes its list anew at each call, and counts whole milliseconds.
        if seconds > 0 and not zmq.zmq_poll(self._items, 0):
            wait_readable(self._epoll.fileno(), min(seconds, MAX_WAIT))
        return set(dict(self._epoll.poll(0.0)))

    def wait(self, seconds: float) -> None:
        """Wait for a message for at most `seconds`."""
        if not zmq.zmq_poll(self._items, 0):
            self._epoll.poll(seconds)

    def receive(self) -> list[list[zmq.Frame]]:
        """Return the frames of the messages that have arrived; the first frame of each is its sender's identity."""
        messages: list[list[zmq.Frame]] = []
        while len(messages) < MAX_QUEUED and zmq.zmq_poll(self._items, 0):
            messages.append(receive_frames(self._socket))
        return messages

    def close(self) -> None:
        self._epoll.close()
        self._context.destroy(linger=0)
        while self._places:
            os.close(self._places.popitem()[1])


def _listen(directory: Path) -> tuple[socket.socket, int]:
    """Return a socket that listens in a directory, and a descriptor of its path."""
    with contextlib.ExitStack() as undo:
        folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        undo.callback(os.close, folder)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        undo.callback(listener.close)
        path = f"/proc/self/fd/{folder}/{NAME}"  # short enough for a socket's, whatever TMPDIR is
        listener.bind(path)
        listener.listen()
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        undo.pop_all()
        os.close(folder)
    return listener, place


def require_descriptors(count: int) -> None:
    """Raise OSError if this process cannot open `count` more descriptors."""
    taken: list[int] = []
    try:
        for _ in range(count):
            taken.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        words = f"{error.strerror}: {count} descriptors are needed; close some, or raise the limit (ulimit -n)"
        raise OSError(error.errno, words) from None
    finally:
        for fd in taken:
            os.close(fd)


class WorkerSocket:
    """A DEALER on the listening socket that this worker has inherited; only the leader's process may connect."""

    def __init__(self, listener: int, leader: int) -> None:
        os.set_inheritable(listener, False)  # by what a model starts
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 1000)  # The last WorkerFailed has a second to be sent.
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        self._socket.setsockopt(zmq.IPC_FILTER_PID, leader)
        self._socket.setsockopt(zmq.USE_FD, listener)  # which has its place already: the name below says nothing
        self._socket.bind("ipc://drp-worker")
        if not self._socket.poll(round(FIRST * 1000), zmq.POLLOUT):
            raise TimeoutError(f"the leader, process {leader}, did not connect within {FIRST:g} s")
        self._timeout = -1.0
        self._received: deque[bytes] = deque()

    def send(self, message: ToLeader) -> None:
        self._socket.send(encode(message), NOBLOCK)

    def receive(self, seconds: float, awake: float = 0.0) -> ToWorker | None:
        """Return the next message, None after `seconds`. The thread polls for the first `awake` seconds."""
        until = time.perf_counter() + awake
        while not self._received and time.perf_counter() < until:
            self._receive_frames(0.0)
            sched_yield()
        if not self._received:
            self._receive_frames(seconds)
        return decode(self._received.popleft(), TO_WORKER) if self._received else None

    def _receive_frames(self, seconds: float) -> None:
        """Receive the messages that were sent together, if there are any within `seconds`."""
        if seconds and seconds != self._timeout:
            self._timeout = seconds
            self._socket.setsockopt(zmq.RCVTIMEO, round(seconds * 1000))
        try:  # noqa: SIM105  # called for every draft
            self._received.extend(self._socket.recv_multipart(0 if seconds else NOBLOCK))
        except zmq.Again:
            pass

    def close(self) -> None:
        """Close the socket; the last messages have a second to be sent."""
        self._socket.close()
        self._context.term()
