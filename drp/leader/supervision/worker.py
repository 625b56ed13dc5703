"""The interfaces of a worker and of its backend: processes of this machine, or processes elsewhere that dial in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from drp.leader.devices import Device
from drp.protocol.frames import Frame
from drp.protocol.messages import ToLeader, ToWorker

Encoded = Sequence[Frame]
"""A message as its worker's backend sends it: one frame, or several where tensors travel with the message."""


class WorkerHandle(Protocol):
    """A worker as the leader sees it.

    A replacement has the number of the lost worker and the next generation, and therefore another identity. Late
    messages of the previous one are ignored.
    """

    @property
    def number(self) -> int:
        """The worker's number, that of its slot."""
        ...

    @property
    def identity(self) -> bytes:
        """A name of number and generation, which no other worker of this leader has."""
        ...

    @property
    def device(self) -> Device:
        """The worker's device; that of a worker elsewhere is known once it has said Hello."""
        ...

    @property
    def shares_memory(self) -> bool:
        """Whether the worker can open the leader's memory, and so use a copy of the weights there."""
        ...

    @property
    def pid(self) -> int | None:
        """The process, by its number on the worker's machine; None while there is none."""
        ...

    @property
    def heartbeat(self) -> int:
        """A count that grows while the worker's main thread waits for messages."""
        ...

    @property
    def is_stopped(self) -> bool:
        """Whether the process is known to be stopped, by SIGSTOP or by a debugger."""
        ...

    def request_heartbeat(self) -> None:
        """Let the heartbeat grow before the next check, where that takes a message."""
        ...

    def encode(self, message: ToWorker) -> Encoded:
        """Return the frames of a message, with the tensors that it names where those travel with it."""
        ...

    def send(self, *messages: Encoded) -> None:
        """Send messages together. A worker that takes none is ended.

        Workers that are gone are found by `WorkerBackend.receive`.
        """
        ...

    def retire(self, why: str) -> tuple[str, int | None]:
        """End the worker, send it `why` if possible, and free its resources; return how it ended and its exit code."""
        ...


Received = tuple[WorkerHandle, ToLeader | None]
"""A message and the worker that has sent it; None in place of the message if the worker has ended."""


class WorkerBackend(Protocol):
    """Starts workers of one kind, receives their messages and detects their ends. Only one thread may use it."""

    @property
    def dropped(self) -> int:
        """Number of messages dropped because they were malformed or from an unknown sender."""
        ...

    def start(self, number: int, generation: int, device: Device) -> WorkerHandle:
        """Start a worker, or begin to wait for one; raise OSError or MemoryError if there is no room for it."""
        ...

    def receive(self, ready: set[int]) -> list[Received]:
        """Return the messages that have arrived with their workers, and the workers that have ended with None.

        A worker's messages come before its end. Malformed messages and those of unknown senders are dropped. `ready`
        are the watched descriptors that can be read.
        """
        ...

    def close(self, grace: float) -> None:
        """End all workers, `grace` seconds after they were told to; free all memory and sockets."""
        ...
