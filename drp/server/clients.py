"""Client sessions: queued messages, unacknowledged results, heartbeats and lost connections."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from drp.protocol.client_messages import ACK_TIMEOUT, HEARTBEAT_INTERVAL, SILENCE_TIMEOUT, Heartbeat, ToClient
from drp.protocol.codec import encode
from drp.protocol.endpoint import Endpoint
from drp.protocol.frames import Frame
from drp.protocol.memory import SharedMemory
from drp.server.server_request import ServerRequest

RETRY_INTERVAL: Final = 0.02
"""Seconds after which sending to a client whose connection was full is tried again."""
MAX_UNSENT: Final = 1024
"""Maximum number of unread messages of one client."""
MAX_BYTES: Final = 4 << 30
"""Maximum number of bytes of unread messages and unacknowledged shared memory, of all clients together."""

log = logging.getLogger(__name__)


@dataclass
class ClientSession:
    """A client's session: its open requests, its unacknowledged results, and its unsent messages.

    `unacknowledged` has, by request, the shared memory of a result and the deadline of its Ack.
    """

    address: bytes
    name: str
    open_requests: dict[int, ServerRequest] = field(default_factory=dict)
    unacknowledged: dict[int, tuple[SharedMemory, float]] = field(default_factory=dict)
    outbox: deque[list[Frame]] = field(default_factory=deque)
    last_sent: float = 0.0
    """When a message was last accepted by the client's connection."""

    @property
    def requests(self) -> int:
        """Number that counts against the client's limit: open requests, unacknowledged results and unread messages."""
        return len(self.open_requests) + len(self.unacknowledged) + len(self.outbox)

    @property
    def nbytes(self) -> int:
        unsent = sum(memoryview(frame).nbytes for frames in self.outbox for frame in frames)
        return unsent + sum(memory.nbytes for memory, _ in self.unacknowledged.values())

    @property
    def expects_messages(self) -> bool:
        """Whether the client expects messages, and therefore heartbeats."""
        return bool(self.open_requests or self.unacknowledged or self.outbox)


class ClientSessions:
    """The sessions of one endpoint.

    on_gone: called with each session that ends.
    on_untaken: called with the session for each result that was not acknowledged in time.
    """

    def __init__(
        self, endpoint: Endpoint, on_gone: Callable[[ClientSession], None], on_untaken: Callable[[ClientSession], None]
    ) -> None:
        self._endpoint, self._on_gone, self._on_unacknowledged = endpoint, on_gone, on_untaken
        self._all: dict[bytes, ClientSession] = {}
        self._probes = 0

    def __len__(self) -> int:
        return len(self._all)

    def get(self, address: bytes) -> ClientSession | None:
        """Return the session of an address, None if there is none."""
        return self._all.get(address)

    def open(self, address: bytes, name: str) -> ClientSession:
        """Begin a session, or return the existing one."""
        return self._all.setdefault(address, ClientSession(address, name, last_sent=time.monotonic()))

    @property
    def unsent(self) -> int:
        return sum(len(client.outbox) for client in self._all.values())

    @property
    def unacknowledged(self) -> int:
        """Number of results in shared memory that were not acknowledged."""
        return sum(len(client.unacknowledged) for client in self._all.values())

    @property
    def poll_timeout(self) -> float:
        """Seconds until `flush` or `check` must be called."""
        return RETRY_INTERVAL if self.unsent else HEARTBEAT_INTERVAL

    def send(self, client: ClientSession, message: ToClient, frames: Sequence[Frame] = ()) -> None:
        """Send a message, or queue it while the client's connection is full; drop a client with too many of them."""
        if self._all.get(client.address) is not client:
            return
        client.outbox.append([encode(message), *frames])
        if len(client.outbox) == 1:
            self._flush(client)
        if len(client.outbox) > MAX_UNSENT:
            log.warning("client %r has left %d messages unread, and is dropped", client.name, MAX_UNSENT)
            self.forget(client)
        elif client.outbox:
            self._limit_bytes()

    def reply(self, address: bytes, message: ToClient) -> None:
        """Answer a peer without a session, if it is still connected."""
        self._endpoint.send(address, [encode(message)])

    def keep(self, client: ClientSession, request: int, memory: SharedMemory) -> None:
        """Keep the shared memory of a result until the client acknowledges it."""
        client.unacknowledged[request] = memory, time.monotonic() + ACK_TIMEOUT
        self._limit_bytes()

    def acknowledge(self, client: ClientSession, request: int) -> None:
        memory, _ = client.unacknowledged.pop(request, (None, 0.0))
        if memory is not None:
            memory.close()

    def flush(self) -> None:
        """Send queued messages as far as connections accept them."""
        for client in [client for client in self._all.values() if client.outbox]:
            self._flush(client)

    def lost(self) -> None:
        """Find the sessions whose connection is lost, after the endpoint has reported that one was."""
        self._probes = 2  # Probe now and at the next check: the report may precede the actual disconnection.
        self._probe()

    def check(self) -> None:
        """Send heartbeats and check deadlines. Call this every `HEARTBEAT_INTERVAL`."""
        if self._probes:
            self._probe()
        now = time.monotonic()
        for client in list(self._all.values()):
            if client.outbox and now - client.last_sent > SILENCE_TIMEOUT:
                self.forget(client)  # The client does not read.
            elif client.expects_messages and not client.outbox and now - client.last_sent >= HEARTBEAT_INTERVAL * 0.9:
                self.send(client, Heartbeat())
            for request in [request for request, (_, until) in client.unacknowledged.items() if now > until]:
                self.acknowledge(client, request)
                self._on_unacknowledged(client)

    def forget(self, client: ClientSession) -> None:
        """End a session, and free what was kept for it."""
        self._all.pop(client.address, None)
        client.outbox.clear()
        for request in list(client.unacknowledged):
            self.acknowledge(client, request)
        self._on_gone(client)

    def close(self) -> None:
        for client in list(self._all.values()):
            self.forget(client)

    def _limit_bytes(self) -> None:
        """Drop the clients with the most kept bytes until the total is within the limit."""
        kept = {
            client.address: client.nbytes for client in self._all.values() if client.outbox or client.unacknowledged
        }
        while sum(kept.values()) > MAX_BYTES:
            address = max(kept, key=kept.__getitem__)
            client = self._all[address]
            log.warning("client %r has left %d bytes unread, and is dropped", client.name, kept.pop(address))
            self.forget(client)

    def _probe(self) -> None:
        self._probes -= 1
        for client in [client for client in self._all.values() if not client.outbox]:
            if self._endpoint.send(client.address, [encode(Heartbeat())]) == "gone":
                self.forget(client)  # "full" is allowed: a client that expects no messages need not read.

    def _flush(self, client: ClientSession) -> None:
        while client.outbox and (sent := self._endpoint.send(client.address, client.outbox[0])) != "full":
            if sent == "gone":
                self.forget(client)
                return
            client.outbox.popleft()
            client.last_sent = time.monotonic()
