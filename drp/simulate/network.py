"""The network between the leader's machine and those of its workers, in the simulator."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from drp.leader.devices import parse_link, parse_rate
from drp.leader.supervision.remote import MAX_IO_THREADS


@dataclass(frozen=True)
class Link:
    """What drafts and predictions of `nbytes` bytes pass on their way to workers on other machines.

    latency: seconds in which a bit reaches the other side.
    bandwidth: bytes per second of the leader's connection, each way, which all workers share; 0 for no limit.
    encryption: bytes per second that a core encrypts or decrypts; 0 without encryption.
    io_threads: the leader's threads that encrypt and decrypt; the workers are spread over them.
    """

    nbytes: int = 0
    latency: float = 0.0
    bandwidth: float = 0.0
    encryption: float = 0.0
    io_threads: int = MAX_IO_THREADS

    @classmethod
    def parse(cls, text: str, encryption: str | None, nbytes: int) -> Link:
        """Return the link for a latency and a bandwidth such as `200us@1GB/s`; raise ValueError for another text."""
        return cls(nbytes, *parse_link(text), parse_rate(encryption) if encryption is not None else 0.0)


class Network:
    """The state of a link: until when each part of the way is busy. Every part takes one tensor after the other."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._busy: defaultdict[str, float] = defaultdict(float)

    def deliver(self, worker: int, sent: float) -> float:
        """Return when a draft that is sent to a worker at a time has arrived there, decrypted."""
        link, thread = self._link, worker % self._link.io_threads
        encrypted = self._pass(f"encrypt {thread}", sent, link.encryption)
        arrived = self._pass("out", encrypted, link.bandwidth) + link.latency
        return self._pass(f"worker {worker}", arrived, link.encryption)

    def leave(self, worker: int, ended: float) -> float:
        """Return when the prediction of an evaluation that ended at a time reaches the leader's machine."""
        return self._pass(f"worker {worker}", ended, self._link.encryption) + self._link.latency

    def receive(self, worker: int, arrived: float) -> float:
        """Return when the leader can read a prediction that has reached its machine; call it in order of arrival."""
        link, thread = self._link, worker % self._link.io_threads
        return self._pass(f"encrypt {thread}", self._pass("in", arrived, link.bandwidth), link.encryption)

    def _pass(self, part: str, since: float, rate: float) -> float:
        if not rate:
            return since
        self._busy[part] = max(self._busy[part], since) + self._link.nbytes / rate
        return self._busy[part]
