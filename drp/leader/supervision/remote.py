"""Workers on other machines, which dial in over TCP; see drp/protocol/SPEC.md and `drp.protocol.inline`."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from drp.errors import ProtocolError
from drp.leader.devices import Device, parse_emulated
from drp.leader.remote import RemoteWorkers
from drp.leader.supervision.dropped import DroppedMessages
from drp.leader.supervision.worker import Encoded, Received
from drp.protocol.arena import Arena
from drp.protocol.codec import decode, encode
from drp.protocol.dial import WorkerKeys
from drp.protocol.endpoint import Endpoint
from drp.protocol.frames import Frame
from drp.protocol.inline import LeaderFrames
from drp.protocol.messages import (
    TO_LEADER,
    VERSION,
    Bind,
    Hello,
    Ping,
    Pong,
    Prediction,
    Rejected,
    Stop,
    ToLeader,
    ToWorker,
    WorkerFailed,
)

MAX_IO_THREADS: Final = 4
"""Maximum number of threads that encrypt; one encrypts about 730 MB/s."""
PROBE_TIME: Final = 3.0
"""Seconds after the end of a connection for which all workers are probed: ZeroMQ does not say whose connection it was,
and may still accept messages for it when it reports the end."""
MAX_RECEIVED: Final = 64
"""Maximum number of messages that are received at once, so that workers that send many cannot stop the leader."""
CLOCK_SAMPLES: Final = 32
"""Number of recent round trips of which the shortest gives the offset of a worker's clock."""

log = logging.getLogger(__name__)


class RemoteWorker:
    """A worker on another machine. Until it has dialed in, `peer` is None.

    peer: the worker's identity on the socket, which it has chosen at random.
    key: the public key with which it has dialed in.
    key_name: the name of the key with which it must dial in; empty for any key.
    failure: how its connection ended; empty while it is open.
    """

    shares_memory: Final = False
    is_stopped: Final = False

    def __init__(self, number: int, generation: int, device: Device, backend: RemoteBackend) -> None:
        self.number, self.identity, self._backend = number, f"worker-{number}-{generation}".encode(), backend
        self.device = replace(device, name=f"remote:{number}", emulated=None, gpu=None)
        self.peer: bytes | None = None
        self.key, self.key_name = b"", ""
        self.pid: int | None = None
        self.failure = ""
        self.heartbeat = 0
        self._frames = LeaderFrames(backend.open_arena)
        self._awaits_pong = False
        self._clock_samples: deque[tuple[float, float]] = deque(maxlen=CLOCK_SAMPLES)
        """Of recent pings, the seconds of the round trip and by how many seconds the worker's clock is ahead."""

    def __str__(self) -> str:
        where = f"process {self.pid}" if self.peer is not None else f"which is to dial in at {self._backend.address}"
        return f"worker {self.number} ({self.device.name}, {where})"

    def connect(self, peer: bytes, key: bytes, hello: Hello) -> None:
        """Use the peer that has sent this Hello as this worker; raise ValueError if its device is invalid."""
        kind, emulated = hello.device.partition(":")[0], None
        if kind == "emulated":
            emulated = parse_emulated(hello.device, self.number)
        name = f"{hello.host}/{hello.device}"
        self.device = replace(self.device, name=name, emulated=emulated, gpu=hello.gpu or None)
        self.peer, self.key, self.pid = peer, key, hello.pid
        self.request_heartbeat()  # The answer comes before any other, so that the clock's offset is known by then.

    def request_heartbeat(self) -> None:
        """Send a Ping, unless the worker has not answered the last one because it evaluates a draft."""
        if not self._awaits_pong or self._backend.probing:
            self._awaits_pong = True
            self.send(self.encode(Ping(time.monotonic())))

    def encode(self, message: ToWorker) -> Encoded:
        return self._frames.encode(message)

    def send(self, *messages: Encoded) -> None:
        """Send messages. A worker that does not accept them is lost; its process ends when it reads the reason."""
        for frames in messages:
            if self.peer is not None and not self.failure:
                self._backend.send(self, frames)

    def decode(self, frames: Sequence[Frame]) -> ToLeader | None:
        """Return a message, its times by this machine's clock; None for a Pong. Raises ProtocolError."""
        message = self._frames.decode(frames)
        if isinstance(message, Pong):
            self._on_pong(message)
            return None
        if isinstance(message, Prediction):
            offset = max(self.clock_offset, message.ended - time.monotonic())  # It ended before the message came.
            received, began, predicted, ended = (
                max(0.0, t - offset) for t in (message.received, message.began, message.predicted, message.ended)
            )
            return replace(message, received=received, began=began, predicted=predicted, ended=ended)
        return message

    @property
    def clock_offset(self) -> float:
        """By how many seconds the worker's CLOCK_MONOTONIC is ahead of this machine's, to half a round trip."""
        return min(self._clock_samples)[1] if self._clock_samples else 0.0

    def retire(self, why: str) -> tuple[str, int | None]:
        return self._backend.retire(self, why)

    def _on_pong(self, pong: Pong) -> None:
        now = time.monotonic()
        self.heartbeat += 1
        self._awaits_pong = False
        self._clock_samples.append((now - pong.sent, pong.clock - (now + pong.sent) / 2))


class RemoteBackend:
    """The workers of one leader that dial in, and the socket that they connect to.

        peer that has sent Hello      held in
        spare, waits for a slot       `_spares`, by its identity on the socket
        the worker of a slot          `_connected`, by its identity on the socket
        lost or not admitted          neither; every further message is answered with Rejected

    Raises ValueError for keys that cannot be used, OSError if the address is in use.
    """

    def __init__(self, source: RemoteWorkers) -> None:
        self._keys = source.read_keys()
        self._launcher = source.make_launcher()
        self._endpoint = Endpoint(
            source.listen,
            self._keys,
            2 * source.count + 16,
            min(MAX_IO_THREADS, os.cpu_count() or 1),
            encrypted=self._keys is not None,
        )
        self._expected: list[RemoteWorker] = []
        self._connected: dict[bytes, RemoteWorker] = {}
        self._spares: dict[bytes, tuple[bytes, Hello]] = {}
        self._ended: list[RemoteWorker] = []
        self._reports: deque[tuple[RemoteWorker, str]] = deque()
        """How launched workers have ended, as the launcher reports it in a separate thread."""
        self._probe_until = 0.0
        self._arenas: weakref.WeakValueDictionary[int, Arena] = weakref.WeakValueDictionary()
        self._dropped = DroppedMessages(log)

    @property
    def dropped(self) -> int:
        return self._dropped.count

    @property
    def address(self) -> str:
        """Where workers dial in."""
        return self._endpoint.address

    @property
    def descriptors(self) -> tuple[int, int]:
        """The descriptors that are ready when there may be a message, or the end of a connection."""
        return self._endpoint.socket.fileno(), self._endpoint.monitor.fileno()

    @property
    def probing(self) -> bool:
        """Whether a connection has ended and the worker that it belonged to is not known yet."""
        return time.monotonic() < self._probe_until

    def open_arena(self, bind: Bind) -> Arena:
        """Return this process's mapping of a run's arena, which all remote workers of the run share."""
        arena = self._arenas.get(bind.run)
        if arena is None:
            arena = self._arenas[bind.run] = Arena.open(bind)
        return arena

    def start(self, number: int, generation: int, device: Device) -> RemoteWorker:
        """Use a worker that has dialed in already, or wait for one; a launcher, if there is one, starts it."""
        worker = RemoteWorker(number, generation, device, self)
        self._expected.append(worker)
        if self._launcher is not None and self._keys is not None:
            worker.key_name = worker.identity.decode()
            public, secret = self._keys.issue(worker.key_name)
            keys = WorkerKeys(worker.key_name, public, secret, self._keys.public)
            try:
                self._launcher.launch(number, keys, self.address, lambda how: self._reports.append((worker, how)))
            except BaseException:
                self._expected.remove(worker)
                raise
        return worker

    def receive(self, ready: set[int]) -> list[Received]:
        received = self._connect_spares()
        while len(received) < MAX_RECEIVED and (got := self._endpoint.receive()) is not None:
            received += self._on_frames(*got)
        return [*received, *((worker, None) for worker in self._find_ended(ready))]

    def _connect_spares(self) -> list[Received]:
        """Use peers that have sent Hello as workers that are waited for; return these workers with their Hello."""
        connected: list[Received] = []
        for peer, (key, hello) in list(self._spares.items()) if self._expected else ():
            names = ("", self._name_of(key))
            worker = next((each for each in self._expected if each.key_name in names), None)
            if worker is None:
                continue
            del self._spares[peer]
            try:
                worker.connect(peer, key, hello)
            except ValueError as error:
                self._reject(peer, str(error))
                continue
            self._expected.remove(worker)
            self._connected[peer] = worker
            log.info("%s has dialed in", worker)
            connected.append((worker, hello))
        return connected

    def _on_frames(self, peer: bytes, key: bytes, frames: Sequence[Frame]) -> list[Received]:
        worker = self._connected.get(peer)
        if worker is None or worker.key != key:
            return self._on_stranger(peer, key, frames)
        try:
            message = worker.decode(frames)
        except ProtocolError as error:
            message = WorkerFailed("sending a message", f"ProtocolError: {error}"[:2000], "")
        return [(worker, message)] if message is not None else []

    def _on_stranger(self, peer: bytes, key: bytes, frames: Sequence[Frame]) -> list[Received]:
        """Handle a message of a peer that is not connected as a worker."""
        try:
            message = decode(bytes(frames[0]), TO_LEADER) if len(frames) == 1 else None
        except ProtocolError as error:
            self._dropped.add(f"no message: {error}")
            return []
        name = self._name_of(key)
        if isinstance(message, Pong) and peer in self._spares:
            return []
        if not isinstance(message, Hello) or peer in self._spares or peer in self._connected:
            self._reject(peer, "it is not a worker of this leader, or no longer; start it anew")
        elif message.version != VERSION:
            self._reject(peer, f"it speaks version {message.version} of the protocol, the leader {VERSION}")
        elif name and not peer.startswith(f"{name}-".encode()):
            self._reject(peer, f"its identity does not begin with {name!r}, the name of its key")
        else:
            self._spares[peer] = key, message
            return self._connect_spares()
        return []

    def _name_of(self, key: bytes) -> str:
        return self._keys.peers.get(key, "") if self._keys is not None else ""

    def _find_ended(self, ready: set[int]) -> list[RemoteWorker]:
        if self.descriptors[1] in ready and self._endpoint.has_lost():
            self._probe_until = time.monotonic() + PROBE_TIME
            for worker in list(self._connected.values()):
                worker.request_heartbeat()
            ping = [encode(Ping(time.monotonic()))]
            self._spares = {p: spare for p, spare in self._spares.items() if self._endpoint.send(p, ping) != "gone"}
        while self._reports:
            worker, how = self._reports.popleft()
            if not worker.failure and (worker in self._expected or worker in self._connected.values()):
                worker.failure = how
                self._ended.append(worker)
        ended, self._ended = self._ended, []
        return ended

    def send(self, worker: RemoteWorker, parts: Sequence[Frame]) -> None:
        """Send a message to a connected worker; a worker that does not take it has ended."""
        assert worker.peer is not None
        outcome = self._endpoint.send(worker.peer, parts)
        if outcome != "sent":
            worker.failure = "does not take its messages" if outcome == "full" else "has lost its connection"
            self._ended.append(worker)

    def retire(self, worker: RemoteWorker, why: str) -> tuple[str, int | None]:
        """Forget a worker; its process ends once it reads why."""
        if worker in self._expected:
            self._expected.remove(worker)
        if worker in self._ended:
            self._ended.remove(worker)
        if worker.peer is not None:
            del self._connected[worker.peer]
            self._endpoint.send(worker.peer, [encode(Rejected((why or worker.failure)[:2000]))])
        if self._launcher is not None and self._keys is not None:
            self._launcher.kill(worker.number)
            self._keys.revoke(worker.key_name)
        return worker.failure or "was given up", None

    def close(self, grace: float) -> None:
        """Send Stop to all workers, and close the socket when all have left, or after `grace` seconds."""
        deadline = time.monotonic() + grace
        stop, ping = [encode(Stop())], [encode(Ping(0.0))]
        left = [peer for peer in (*self._connected, *self._spares) if self._endpoint.send(peer, stop) != "gone"]
        while left and (seconds := deadline - time.monotonic()) > 0:
            self._endpoint.monitor.poll(min(100, round(seconds * 1000)))
            self._endpoint.has_lost()
            left = [peer for peer in left if self._endpoint.send(peer, ping) != "gone"]
        self._endpoint.close()
        if self._launcher is not None:
            self._launcher.close()

    def _reject(self, peer: bytes, reason: str) -> None:
        self._dropped.add(f"{peer[:100]!r} is rejected: {reason}")
        self._endpoint.send(peer, [encode(Rejected(reason[:2000]))])
