"""The socket of a worker on another machine, which dials its leader over TCP."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from drp.errors import WorkerError
from drp.protocol import keys
from drp.protocol.client_messages import MAX_FRAME_NBYTES
from drp.protocol.inline import WorkerFrames
from drp.protocol.messages import Ping, Pong, Rejected, ToLeader, ToWorker
from drp.protocol.tcp import detect_lost_peers
from drp.protocol.transport import receive_frames, send_frames

MAX_FAILED_HANDSHAKES: Final = 3
"""The number of handshakes that may fail without a reason before a worker gives up: the leader has another key than
`server.key` says."""
EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_MONITOR_STOPPED
)


@dataclass(frozen=True)
class WorkerKeys:
    """A worker's key pair and its leader's public key, in Z85; the worker's name is that of its file."""

    name: str
    public: bytes
    secret: bytes
    leader: bytes

    @classmethod
    def read(cls, path: Path, leader: Path | None = None) -> WorkerKeys:
        """Read the file of a worker's secret key, as `drp keys` makes it.

        `leader` is the file of the leader's public key; by default `server.key` beside the worker's, or a folder above.
        """
        public, secret = keys.pair(path)
        beside = [folder / "server.key" for folder in (path.absolute().parent, path.absolute().parent.parent)]
        if leader is None:
            leader = next((each for each in beside if each.is_file()), None)
        if leader is None:
            raise ValueError(f"there is no leader's key at {beside[0]} or {beside[1]}; copy server.key there")
        return cls(path.name.removesuffix(keys.SECRET), public, secret, keys.public(leader))


class DialedSocket:
    """A DEALER that dials the leader at `address`, `tcp://HOST:PORT`, and is connected once constructed.

    keys: None for a leader without encryption.
    timeout: seconds within which the leader must have admitted this worker.
    on_lost: called in a thread of this socket once the connection is lost, unless `close` was called before. A lost
        connection is not restored: the leader has given this worker's drafts to other workers.

    Raises PermissionError if the leader rejects this worker, TimeoutError if no leader answers in time.
    """

    def __init__(
        self, address: str, keys: WorkerKeys | None, timeout: float, on_lost: Callable[[], None], name: str = "worker"
    ) -> None:
        self._frames, self._on_lost, self._closing = WorkerFrames(), on_lost, False
        self._timeout = -1.0
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        # Others must not be able to guess the identity: a peer that uses it receives this worker's messages.
        identity = f"{keys.name if keys is not None else name}-{uuid.uuid4().hex}"
        self._socket.setsockopt(zmq.IDENTITY, identity.encode())
        self._socket.setsockopt(zmq.LINGER, 1000)  # ms in which a last message is sent after closing
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_NBYTES)
        detect_lost_peers(self._socket)
        if keys is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.leader)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        self._monitor = self._socket.get_monitor_socket(EVENTS)
        try:
            self._socket.connect(address)
            self._shake_hands(address, time.monotonic() + timeout)
        except BaseException:
            self._monitor.close()
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._watch, name="drp-connection", daemon=True)
        self._thread.start()

    def send(self, message: ToLeader) -> None:
        send_frames(self._socket, self._frames.encode(message), flags=0)

    def receive(self, seconds: float, awake: float = 0.0) -> ToWorker | None:
        """Return the next message; None if none came in time, or a Ping, which this answers.

        Raises WorkerError if the leader rejects the worker.
        """
        if seconds != self._timeout:
            self._timeout = seconds
            self._socket.setsockopt(zmq.RCVTIMEO, round(seconds * 1000))
        try:
            frames = receive_frames(self._socket, flags=0)
        except zmq.Again:
            return None
        message = self._frames.decode([frame.buffer for frame in frames])
        if isinstance(message, Rejected):
            raise WorkerError(f"the leader does not use this worker: {message.reason}")
        if isinstance(message, Ping):
            self.send(Pong(message.sent, time.monotonic()))
            return None
        return message

    def close(self) -> None:
        """Close the socket; the last messages are sent for up to a second."""
        self._closing = True
        self._socket.disable_monitor()
        self._thread.join(5.0)
        self._socket.close()
        self._context.term()
        self._frames.close()

    def _shake_hands(self, address: str, deadline: float) -> None:
        failed = 0
        while self._monitor.poll(max(0, round((deadline - time.monotonic()) * 1000))):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return
            failed += event != zmq.EVENT_DISCONNECTED
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                raise PermissionError(f"the leader at {address} does not know this worker's key")
            if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL or failed >= MAX_FAILED_HANDSHAKES:
                raise PermissionError(
                    f"the leader at {address} has another key than server.key says, or it encrypts and this worker "
                    "does not, or the other way around"
                )
        raise TimeoutError(f"no leader has answered at {address}; does it listen there?")

    def _watch(self) -> None:
        with self._monitor as monitor:
            while True:
                event = parse_monitor_message(monitor.recv_multipart())["event"]
                if event == zmq.EVENT_DISCONNECTED and not self._closing:
                    self._on_lost()
                if event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_MONITOR_STOPPED):
                    return
