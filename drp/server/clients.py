"""Clients: who is at the door, what each has been told and has not had room for, and who is gone."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from drp.protocol.codec import encode
from drp.protocol.door import BEAT, SILENCE, TAKE, Beat, ToClient
from drp.protocol.frames import Frame
from drp.protocol.memory import SharedMemory
from drp.server.endpoint import Endpoint
from drp.server.ticket import Ticket

AGAIN: Final = 0.02
"""Seconds after which a client that had no room for a message is tried again."""
MAX_UNSENT: Final = 1024
"""Messages that one client may leave unread."""
MAX_BYTES: Final = 4 << 30
"""Bytes that all clients together may leave unread, or in shared memory that they have not taken."""

log = logging.getLogger(__name__)


@dataclass
class Client:
    """A session: its requests under way, the results that it has to take, and the messages it has had no room for."""

    address: bytes
    name: str
    tickets: dict[int, Ticket] = field(default_factory=dict)
    untaken: dict[int, tuple[SharedMemory, float]] = field(default_factory=dict)
    outbox: deque[list[Frame]] = field(default_factory=deque)
    told: float = 0.0
    """When it last took something."""

    @property
    def requests(self) -> int:
        """How many requests count against its share: those under way, and what it has not read or taken of others."""
        return len(self.tickets) + len(self.untaken) + len(self.outbox)

    @property
    def nbytes(self) -> int:
        """The bytes that are kept for it."""
        unsent = sum(memoryview(frame).nbytes for frames in self.outbox for frame in frames)
        return unsent + sum(memory.nbytes for memory, _ in self.untaken.values())

    @property
    def waits(self) -> bool:
        """Whether it may count on hearing something."""
        return bool(self.tickets or self.untaken or self.outbox)


class Clients:
    """The sessions of one endpoint; `on_gone` is called with each that ends, `on_untaken` with each result left."""

    def __init__(
        self, endpoint: Endpoint, on_gone: Callable[[Client], None], on_untaken: Callable[[Client], None]
    ) -> None:
        self._endpoint, self._on_gone, self._on_untaken = endpoint, on_gone, on_untaken
        self._all: dict[bytes, Client] = {}
        self._probes = 0

    def __len__(self) -> int:
        return len(self._all)

    def get(self, address: bytes) -> Client | None:
        """Return the session at an address, if it has one."""
        return self._all.get(address)

    def open(self, address: bytes, name: str) -> Client:
        """Begin a session, or go on with it."""
        return self._all.setdefault(address, Client(address, name, told=time.monotonic()))

    @property
    def unsent(self) -> int:
        """How many messages clients have had no room for."""
        return sum(len(client.outbox) for client in self._all.values())

    @property
    def untaken(self) -> int:
        """How many results wait in shared memory."""
        return sum(len(client.untaken) for client in self._all.values())

    @property
    def patience(self) -> float:
        """Seconds until something has to be tried again, or looked at."""
        return AGAIN if self.unsent else BEAT

    def send(self, client: Client, message: ToClient, frames: Sequence[Frame] = ()) -> None:
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

    def keep(self, client: Client, request: int, memory: SharedMemory) -> None:
        """Hold the shared memory of a result until it is taken."""
        client.untaken[request] = memory, time.monotonic() + TAKE
        self._limit_bytes()

    def taken(self, client: Client, request: int) -> None:
        """Give the memory of a result back."""
        memory, _ = client.untaken.pop(request, (None, 0.0))
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

    def look(self) -> None:
        """To be called once a `BEAT`: tell those who wait that the server is there, and see to deadlines."""
        if self._probes:
            self._probe()
        now = time.monotonic()
        for client in list(self._all.values()):
            if client.outbox and now - client.told > SILENCE:
                self.forget(client)  # It does not read.
            elif client.waits and not client.outbox and now - client.told >= BEAT * 0.9:
                self.send(client, Beat())
            for request in [request for request, (_, until) in client.untaken.items() if now > until]:
                self.taken(client, request)
                self._on_untaken(client)

    def forget(self, client: Client) -> None:
        """End a session, and give back what was meant for it."""
        self._all.pop(client.address, None)
        client.outbox.clear()
        for request in list(client.untaken):
            self.taken(client, request)
        self._on_gone(client)

    def close(self) -> None:
        """End all sessions."""
        for client in list(self._all.values()):
            self.forget(client)

    def _limit_bytes(self) -> None:
        """Forget the clients that most is kept for, while more is kept than may be."""
        kept = {client.address: client.nbytes for client in self._all.values() if client.outbox or client.untaken}
        while sum(kept.values()) > MAX_BYTES:
            address = max(kept, key=kept.__getitem__)
            client = self._all[address]
            log.warning("client %r has left %d bytes unread, and is dropped", client.name, kept.pop(address))
            self.forget(client)

    def _probe(self) -> None:
        self._probes -= 1
        for client in [client for client in self._all.values() if not client.outbox]:
            if self._endpoint.send(client.address, [encode(Beat())]) == "gone":
                self.forget(client)  # "full" is no matter: who waits for nothing need not read.

    def _flush(self, client: Client) -> None:
        while client.outbox and (sent := self._endpoint.send(client.address, client.outbox[0])) != "full":
            if sent == "gone":
                self.forget(client)
                return
            client.outbox.popleft()
            client.told = time.monotonic()
