"""A policy of one's own: the last device is kept to take over what is late on the others.

    python examples/own_policy.py

The engine on emulated devices and the simulator run the same object.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import drp
from drp.leader.scheduling.policies import POLICIES, Policy, Waiting
from drp.sampling.modes import Aggressive
from drp.simulate import Workload, make_devices, simulate


@dataclass(frozen=True)
class Spare(Policy):
    """A draft later than 1.2 times the usual goes to the last device too, which has no others."""

    hedge: float | None = 1.2
    depth: int = 1

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return nothing for the last worker, and the oldest run's draft for the others."""
        return None if worker == workers - 1 else super().choose(worker, workers, runs)


if __name__ == "__main__":
    device = "emulated:20ms:straggler=3x@5%:values=cheap"
    with drp.Leader("digits", devices=[device] * 8, policy="barrier") as leader:
        for policy in (POLICIES["barrier"], Spare()):
            leader.policy = policy
            runs = [leader.sample(labels=[3], mode="aggressive", drafts=7).seconds for _ in range(20)]
            simulated = simulate(make_devices([device] * 8), policy, Workload(Aggressive(7), count=1000)).mean
            print(f"{type(policy).__name__}: {statistics.mean(runs):.3f} s; without costs {simulated:.3f} s")
