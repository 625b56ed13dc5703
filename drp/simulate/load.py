"""The requests of a simulation."""

from __future__ import annotations

import random
from dataclasses import dataclass

from drp.sampling.modes import Mode


@dataclass(frozen=True)
class Workload:
    """`count` requests of `steps` steps in a mode, numbered from `first`.

    rate: the arrivals per second, as a Poisson process. With 0, each of `users` users sends a request as soon as the
        previous one has ended.
    """

    mode: Mode
    steps: int = 48
    count: int = 100
    rate: float = 0.0
    users: int = 1
    first: int = 0

    def arrivals(self, draws: random.Random) -> list[float]:
        """Return the arrival times in seconds that do not depend on the ends of other requests."""
        if not self.rate:
            return [0.0] * min(self.users, self.count)
        now, times = 0.0, []
        for _ in range(self.count):
            now += draws.expovariate(self.rate)
            times.append(now)
        return times
