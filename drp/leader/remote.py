"""Workers on other machines, as a leader's `devices`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from drp.limits import MAX_WORKERS, check_count
from drp.protocol.dial import WorkerKeys
from drp.protocol.endpoint import check_address
from drp.protocol.keys import Keys


class Launcher(Protocol):
    """Starts and ends workers on other machines, by number. A worker then dials in with the keys that it was given."""

    def launch(self, number: int, keys: WorkerKeys, address: str, on_end: Callable[[str], None]) -> None:
        """Start a worker; raise OSError if that fails. `on_end` is called in any thread with how its process ended."""
        ...

    def kill(self, number: int) -> None:
        """End a worker that was launched, if it still runs."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


@dataclass(frozen=True)
class RemoteWorkers:
    """Workers that dial in: `count` processes `drp worker`, on any machine, started by whoever starts them there.

        with drp.Leader("digits", devices=drp.RemoteWorkers(4, "tcp://0.0.0.0:5555", keys="keys")) as leader:
            result = leader.sample(labels=[3, 1, 4])

    The leader starts when all have dialed in. More than `count` may: they wait to replace a worker that is lost.

    count: the number of workers.
    listen: the address at which the leader listens, tcp://HOST:PORT.
    keys: the directory that `drp keys` has made, with the leader's key pair and the public keys of the workers.
    transport_security: "curve" encrypts, and lets only workers with known keys in. "none" does neither: anybody who
        reaches the address may be a worker, and see and change the drafts. It is for a trusted network.
    """

    count: int
    listen: str
    keys: str | os.PathLike[str] | None = None
    transport_security: Literal["curve", "none"] = "curve"

    def __post_init__(self) -> None:
        check_count("count", self.count, MAX_WORKERS)
        if self.transport_security not in ("curve", "none"):
            raise ValueError(f"transport_security is {self.transport_security!r}; give 'curve', or 'none'")
        if (self.keys is None) == (self.transport_security == "curve"):
            raise ValueError(
                f"keys is {self.keys!r} and transport_security {self.transport_security!r}; give the directory that "
                "`drp keys` has made, or none of it without encryption"
            )
        if not self.listen.startswith("tcp://"):
            raise ValueError(f"listen is {self.listen!r}; give tcp://HOST:PORT, where HOST may be 0.0.0.0")

    def make_launcher(self) -> Launcher | None:
        """Return what starts the workers; None where they are started by others."""
        return None

    def read_keys(self) -> Keys | None:
        """Return the leader's keys and those of the workers; raise ValueError that names a file that is not usable."""
        keys = Keys.read(Path(self.keys), "workers") if self.keys is not None else None
        if keys is not None and not keys.peers:
            raise ValueError(
                f"no worker has a key in {self.keys}/workers; `drp keys {self.keys} --worker NAME` makes one"
            )
        check_address(self.listen, keys, encrypted=keys is not None)
        return keys
