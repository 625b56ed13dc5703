"""Endpoint: the door's socket, which opens only to its own user (ipc://) or to clients with known keys (tcp://)."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import zmq
from zmq.auth.thread import ThreadAuthenticator

from drp.protocol.door import MAX_FRAME
from drp.protocol.tensors import Frame
from drp.protocol.transport import MAX_PATH
from drp.server.keys import Keys

OUT: Final = 64
"""Messages that wait in a connection, each way, for a peer that is slower."""


Sent = Literal["sent", "full", "gone"]
"""What became of a message: the client may have no room for it now, or may be there no more."""


class Endpoint:
    """A ROUTER bound to `address`. One thread uses it."""

    def __init__(self, address: str, keys: Keys | None = None) -> None:
        self.local = address.startswith("ipc://")
        self._path = check_address(address, keys)
        self._context = zmq.Context(io_threads=1)
        self._authenticator: ThreadAuthenticator | None = None
        self.socket = self._context.socket(zmq.ROUTER)
        self.monitor = self.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        try:
            self.socket.setsockopt(zmq.LINGER, 1000)  # Last answers have a second to leave.
            self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
            self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # Sending to a client that is gone is an error.
            self.socket.setsockopt(zmq.SNDHWM, OUT)
            self.socket.setsockopt(zmq.RCVHWM, OUT)
            # A peer that does not answer these, dead or stopped, is disconnected.
            self.socket.setsockopt(zmq.HEARTBEAT_IVL, 1000)
            self.socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 5000)
            self.socket.setsockopt(zmq.HANDSHAKE_IVL, 5000)
            if keys is not None and not self.local:
                self._admit(keys)
            try:
                self.socket.bind(address)
            except zmq.ZMQError as error:
                raise OSError(f"cannot listen on {address}: {error}") from None
            self.address = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
            if self._path is not None:
                self._path.chmod(0o600)
        except BaseException:
            self.close()
            raise

    def _admit(self, keys: Keys) -> None:
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        self.socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve(domain="*", location=str(keys.clients))

    def send(self, client: bytes, parts: Sequence[Frame]) -> Sent:
        """Send a message's frames at once, all or none."""
        try:
            self.socket.send_multipart([client, *parts], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return "full"
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            return "gone"
        return "sent"

    def receive(self) -> tuple[bytes, list[Frame]] | None:
        """Return a waiting message and who sent it, or None."""
        try:
            client, *frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        return client.bytes, [frame.buffer for frame in frames]

    def has_lost(self) -> bool:
        """Return whether a connection was lost since the last call."""
        lost = False
        while self.monitor.poll(0):
            self.monitor.recv_multipart(zmq.NOBLOCK)
            lost = True
        return lost

    def close(self) -> None:
        """Close; what was sent last has a moment to leave."""
        if self._authenticator is not None:
            self._authenticator.stop()
        self.socket.disable_monitor()
        self.monitor.close()
        self.socket.close()
        self._context.term()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def default_address() -> str:
    """Return where `drp serve` listens unless told otherwise: in the user's runtime directory, or one in /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return f"ipc://{runtime}/drp/door" if runtime else f"ipc:///tmp/drp-{os.getuid()}/door"


def check_address(address: str, keys: Keys | None) -> Path | None:
    """Return the path of an ipc address; raise ValueError for an address that a server must not have."""
    if address.startswith("ipc://"):
        return _private(address)
    if not address.startswith("tcp://") or keys is None:
        raise ValueError(
            f"cannot listen on {address!r}: give ipc://PATH, or tcp://HOST:PORT with keys, which `drp keys` makes"
        )
    return None


def _private(address: str) -> Path:
    """Return an ipc address's path, in a directory that only this user can enter; make that if it is missing."""
    path = Path(address.removeprefix("ipc://"))
    if not path.is_absolute() or len(str(path)) > MAX_PATH:
        raise ValueError(f"{address!r} is no address; give ipc:// and a whole path of at most {MAX_PATH} characters")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = path.parent.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise ValueError(f"{path.parent} is another user's, or can be entered by others; name a directory of mode 0700")
    if _answers(path):
        raise ValueError(f"another server listens on {address}; stop that, or choose another path")
    return path


def _answers(path: Path) -> bool:
    """Return whether a process listens on a Unix socket; binding would take its name away."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
