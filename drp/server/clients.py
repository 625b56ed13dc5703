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
from drp.protocol.frames import Frame
from drp.protocol.memory import SharedMemory
from drp.server.endpoint import Endpoint
from drp.server.server_request import ServerRequest

RETRY_INTERVAL: Final = 0.02
"""Seconds after which a client that had no room for a message is tried again."""
MAX_UNSENT: Final = 1024
"""Messages that one client may leave unread."""
MAX_BYTES: Final = 4 << 30
"""Bytes that all clients together may leave unread, or in shared memory that they have not taken."""

log = logging.getLogger(__name__)


@dataclass
class ClientSession:
    """A session: its requests under way, the results that it has to take, and the messages it has had no room for."""

    address: bytes
    name: str
    open_requests: dict[int, ServerRequest] = field(default_factory=dict)
    unacknowledged: dict[int, tuple[SharedMemory, float]] = field(default_factory=dict)
    outbox: deque[list[Frame]] = field(default_factory=deque)
    last_sent: float = 0.0
    """When it last took something."""

    @property
    def requests(self) -> int:
        """How many requests count against its share: those under way, and what it has not read or taken of others."""
        return len(self.open_requests) + len(self.unacknowledged) + len(self.outbox)

    @property
    def nbytes(self) -> int:
        """The bytes that are kept for it."""
        unsent = sum(memoryview(frame).nbytes for frames in self.outbox for frame in frames)
        return unsent + sum(memory.nbytes for memory, _ in self.unacknowledged.values())

    @property
    def expects_messages(self) -> bool:
        """Whether it may count on hearing something."""
        return bool(self.open_requests or self.unacknowledged or self.outbox)


class ClientSessions:
    """The sessions of one endpoint; `on_gone` is called with each that ends, `on_untaken` with each result left."""

    def __init__(
        self, endpoint: Endpoint, on_gone: Callable[[ClientSession], None], on_untaken: Callable[[ClientSession], None]
    ) -> None:
        self._endpoint, self._on_gone, self._on_unacknowledged = endpoint, on_gone, on_untaken
        self._all: dict[bytes, ClientSession] = {}
        self._probes = 0

    def __len__(self) -> int:
        return len(self._all)

    def get(self, address: bytes) -> ClientSession | None:
        """Return the session at an address, if it has one."""
        return self._all.get(address)

    def open(self, address: bytes, name: str) -> ClientSession:
        """Begin a session, or go on with it."""
        return self._all.setdefault(address, ClientSession(address, name, last_sent=time.monotonic()))

    @property
    def unsent(self) -> int:
        """How many messages clients have had no room for."""
        return sum(len(client.outbox) for client in self._all.values())

    @property
    def unacknowledged(self) -> int:
        """How many results wait in shared memory."""
        return sum(len(client.unacknowledged) for client in self._all.values())

    @property
    def poll_timeout(self) -> float:
        """Seconds until something has to be tried again, or looked at."""
        return RETRY_INTERVAL if self.unsent else HEARTBEAT_INTERVAL

    def send(self, client: ClientSession, message: ToClient, frames: Sequence[Frame] = ()) -> None:
        """Send a message, or keep it until the client has room; forget a client that leaves too much unread."""
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
        """Answer somebody who has no session, if they listen."""
        self._endpoint.send(address, [encode(message)])

    def keep(self, client: ClientSession, request: int, memory: SharedMemory) -> None:
        """Hold the shared memory of a result until it is taken."""
        client.unacknowledged[request] = memory, time.monotonic() + ACK_TIMEOUT
        self._limit_bytes()

    def acknowledge(self, client: ClientSession, request: int) -> None:
        """Give the memory of a result back."""
        memory, _ = client.unacknowledged.pop(request, (None, 0.0))
        if memory is not None:
            memory.close()

    def flush(self) -> None:
        """Send what clients have room for now."""
        for client in [client for client in self._all.values() if client.outbox]:
            self._flush(client)

    def lost(self) -> None:
        """Find out who is gone: a connection was lost, or is about to be."""
        self._probes = 2  # Now, and at the next look: the news may be there before the connection is gone.
        self._probe()

    def check(self) -> None:
        """Send heartbeats and check deadlines; to be called every `HEARTBEAT_INTERVAL`."""
        if self._probes:
            self._probe()
        now = time.monotonic()
        for client in list(self._all.values()):
            if client.outbox and now - client.last_sent > SILENCE_TIMEOUT:
                self.forget(client)  # It does not read.
            elif client.expects_messages and not client.outbox and now - client.last_sent >= HEARTBEAT_INTERVAL * 0.9:
                self.send(client, Heartbeat())
            for request in [request for request, (_, until) in client.unacknowledged.items() if now > until]:
                self.acknowledge(client, request)
                self._on_unacknowledged(client)

    def forget(self, client: ClientSession) -> None:
        """End a session, and give back what was meant for it."""
        self._all.pop(client.address, None)
        client.outbox.clear()
        for request in list(client.unacknowledged):
            self.acknowledge(client, request)
        self._on_gone(client)

    def close(self) -> None:
        """End all sessions."""
        for client in list(self._all.values()):
            self.forget(client)

    def _limit_bytes(self) -> None:
        """Forget the clients that most is kept for, while more is kept than may be."""
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
                self.forget(client)  # "full" is no matter: who waits for nothing need not read.

    def _flush(self, client: ClientSession) -> None:
        while client.outbox and (sent := self._endpoint.send(client.address, client.outbox[0])) != "full":
            if sent == "gone":
                self.forget(client)
                return
            client.outbox.popleft()
            client.last_sent = time.monotonic()
