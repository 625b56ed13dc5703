"""A listening socket: accessible to the same user only (ipc://), or to peers with known keys (tcp://)."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import socket
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from drp.protocol.client_messages import MAX_FRAME_NBYTES
from drp.protocol.frames import Frame
from drp.protocol.keys import Keys
from drp.protocol.tcp import detect_lost_peers
from drp.protocol.transport import MAX_PATH, has_message, receive_frames, send_frames

OUT: Final = 64
"""Messages queued per connection in each direction, for a slower peer."""
WARN_EVERY: Final = 60.0
"""Seconds between two warnings about too many connections."""

log = logging.getLogger(__name__)

Sent = Literal["sent", "full", "gone"]
"""The outcome of sending a message: sent, the client's queue is full, or the client is gone."""


class Endpoint:
    """A ROUTER socket bound to `address`, for use by one thread.

    keys: of this side and of the peers that are let in; None over ipc://, or where `encrypted` is False.
    encrypted: whether tcp:// takes keys. If not, anyone who can reach the address is accepted, and all data is readable
        on the network.
    io_threads: the number of threads that send, receive, encrypt and decrypt; each connection uses one of them.
    max_connections: further connections are closed. libzmq aborts the process if there is no descriptor left when it
        accepts a connection (`ipc_listener.cpp` does not handle EMFILE), so this must be below the process's limit.
    """

    def __init__(
        self,
        address: str,
        keys: Keys | None = None,
        max_connections: int = 272,
        io_threads: int = 1,
        encrypted: bool = True,
    ) -> None:
        self._max_connections, self._connections = max_connections, set[int]()
        self._warned = -math.inf
        self.local = address.startswith("ipc://")
        self._path = check_address(address, keys, encrypted)
        self._context = zmq.Context(io_threads=io_threads)
        self._authenticator: ThreadAuthenticator | None = None
        self.socket = self._context.socket(zmq.ROUTER)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        try:
            self.socket.setsockopt(zmq.LINGER, 1000)  # ms in which the last messages are sent after closing
            self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_NBYTES)
            self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # Sending to a client that is gone is an error.
            self.socket.setsockopt(zmq.SNDHWM, OUT)
            self.socket.setsockopt(zmq.RCVHWM, OUT)
            detect_lost_peers(self.socket)
            self.socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
            if keys is not None and not self.local:
                self._admit(keys)
            try:
                self.socket.bind(address if self._path is None else f"ipc://{self._path}")
            except zmq.ZMQError as error:
                raise OSError(f"cannot listen on {address}: {error}") from None
            self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
            if self._path is not None:
                self._path.chmod(0o600)
            # libzmq signals a socket's descriptor only for what comes after the socket was once found empty.
            self.has_lost()
        except BaseException:
            self.close()
            raise

    def _admit(self, keys: Keys) -> None:
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        self.socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.configure_curve_callback(credentials_provider=keys)
        self._authenticator.start()

    def send(self, client: bytes, parts: Sequence[Frame]) -> Sent:
        """Send all frames of a message, or none, without waiting."""
        try:
            send_frames(self.socket, (client, *parts))
        except zmq.Again:
            return "full"
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            return "gone"
        return "sent"

    def receive(self) -> tuple[bytes, bytes, list[Frame]] | None:
        """Return the sender, its public key in Z85 and the frames of a waiting message, or None.

        The key is empty over a connection without keys. The sender is the identity that the peer has chosen: only the
        key says who it is.
        """
        if not has_message(self.socket):
            return None
        peer, *frames = receive_frames(self.socket)
        key = peer.get("User-Id") if self._authenticator is not None else ""
        return peer.bytes, str(key).encode(), [frame.buffer for frame in frames]

    def has_lost(self) -> bool:
        """Return whether a connection was lost since the last call; close new connections beyond the limit."""
        lost = False
        while self.monitor.poll(0):
            event = parse_monitor_message(self.monitor.recv_multipart(zmq.NOBLOCK))
            descriptor = int(event["value"])
            if event["event"] == zmq.EVENT_DISCONNECTED:
                self._connections.discard(descriptor)
                lost = True
                continue
            self._connections.add(descriptor)
            if len(self._connections) > self._max_connections:
                self._disconnect(descriptor)
                if time.monotonic() - self._warned > WARN_EVERY:
                    self._warned = time.monotonic()
                    log.warning("%d connections are open; those beyond are closed", self._max_connections)
        return lost

    def _disconnect(self, descriptor: int) -> None:
        """Shut a connection down, which libzmq then closes. A descriptor that was reused in the meantime is ignored."""
        try:
            duplicate = os.dup(descriptor)
        except OSError:  # It is closed already.
            return
        try:
            connection = socket.socket(fileno=duplicate)
        except OSError:  # It is no socket now.
            os.close(duplicate)
            return
        with connection, contextlib.suppress(OSError):  # It may be disconnected in the meantime.
            own = connection.getsockname()
            if own == str(self._path) if self.local else own[1:2] == (int(self.address.rpartition(":")[2]),):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; the last messages are sent for up to the linger time."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()
        self._context.term()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def check_address(address: str, keys: Keys | None, encrypted: bool = True) -> Path | None:
    """Return the path of an ipc address, None for tcp; raise ValueError for an address that is not allowed."""
    if address.startswith("ipc://"):
        return _private(address)
    if not address.startswith("tcp://") or (keys is None and encrypted):
        raise ValueError(
            f"cannot listen on {address!r}: give ipc://PATH, or tcp://HOST:PORT with keys, which `drp keys` makes"
        )
    return None


def _private(address: str) -> Path:
    """Return the path of an ipc address; its directory, created if missing, must be accessible to this user only."""
    path = Path(address.removeprefix("ipc://")).absolute()
    if len(str(path)) > MAX_PATH:
        raise ValueError(f"{address!r} is not an address; give ipc:// and a path of at most {MAX_PATH} characters")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = path.parent.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ValueError(f"{path.parent} is another user's, or can be entered by others; name a directory of mode 0700")
    if _answers(path):
        raise ValueError(f"another server listens on {address}; stop that, or choose another path")
    return path


def _answers(path: Path) -> bool:
    """Return whether a process listens on a Unix socket, whose path binding would replace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
