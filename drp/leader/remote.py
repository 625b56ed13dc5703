"""Workers on other machines, as a leader's `devices`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from drp.limits import MAX_WORKERS, check_whole
from drp.protocol.dial import WorkerKeys
from drp.protocol.endpoint import check_address
from drp.protocol.keys import Keys


class Launcher(Protocol):
    """Starts and ends workers on other machines, by number. A worker dials in with the keys that it is given."""

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
    """Workers on other machines: `count` processes `drp worker`, started there by hand or by a cluster, which dial in.

        with drp.Leader("digits", devices=drp.RemoteWorkers(4, "tcp://0.0.0.0:5555", keys="keys")) as leader:
            result = leader.sample(labels=[3, 1, 4])

    The leader starts when `count` workers have dialed in. Further ones wait to replace a worker that is lost.

    count: the number of workers.
    listen: the address at which the leader listens, tcp://HOST:PORT.
    keys: the directory made by `drp keys`, with the leader's key pair and the public keys of the workers.
    transport_security: "curve" encrypts, and admits only workers with known keys. "none" does neither: everybody who
        can reach the address may act as a worker, and read and change drafts. It is for a trusted network.
    """

    count: int
    listen: str
    keys: str | os.PathLike[str] | None = None
    transport_security: Literal["curve", "none"] = "curve"

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", check_whole("count", self.count, 1, MAX_WORKERS))
        if self.transport_security not in ("curve", "none"):
            raise ValueError(f"transport_security is {self.transport_security!r}; give 'curve', or 'none'")
        if (self.keys is None) == (self.transport_security == "curve"):
            raise ValueError(
                f"keys is {self.keys!r} and transport_security {self.transport_security!r}; give the directory that "
                "`drp keys` has made, with 'curve', and no keys with 'none'"
            )
        if not self.listen.startswith("tcp://"):
            raise ValueError(f"listen is {self.listen!r}; give tcp://HOST:PORT, where HOST may be 0.0.0.0")

    def make_launcher(self) -> Launcher | None:
        """Return the launcher of the workers, None if they are not started by the leader."""
        return None

    def read_keys(self) -> Keys | None:
        """Read the keys of the leader and the workers; raise ValueError, naming the file, if one is not usable."""
        keys = Keys.read(Path(self.keys), "workers") if self.keys is not None else None
        if keys is not None and not keys.peers:
            raise ValueError(
                f"no worker has a key in {self.keys}/workers; `drp keys {self.keys} --worker NAME` makes one"
            )
        check_address(self.listen, keys, encrypted=keys is not None)
        return keys
