"""A custom policy: the last device is reserved for drafts that are late on the others.

    python examples/own_policy.py

The engine, here on emulated devices, and the simulator use the same object.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import drp
from drp.leader.scheduling.policies import POLICIES, Policy, Waiting
from drp.sampling.modes import Aggressive
from drp.simulate import Workload, make_devices, simulate


@dataclass(frozen=True)
class ReservedDevice(Policy):
    """A draft that takes 1.2 times the median latency is also sent to the last device, which has no other drafts."""

    hedge: float | None = 1.2
    depth: int = 1

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return None for the last worker, and the oldest run for the others."""
        return None if worker == workers - 1 else super().choose(worker, workers, runs)


if __name__ == "__main__":
    device = "emulated:20ms:straggler=3x@5%:values=cheap"
    with drp.Leader("digits", devices=[device] * 8, policy="barrier") as leader:
        for policy in (POLICIES["barrier"], ReservedDevice()):
            leader.policy = policy
            runs = [leader.sample(labels=[3], mode="aggressive", drafts=7).seconds for _ in range(20)]
            simulated = simulate(make_devices([device] * 8), policy, Workload(Aggressive(7), count=1000)).mean
            print(f"{type(policy).__name__}: {statistics.mean(runs):.3f} s; without costs {simulated:.3f} s")
