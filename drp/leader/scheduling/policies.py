"""Policies: when drafts go out, to whom, and whether twice. The same objects drive the engine and the simulator.

Notation of the theory: N steps, n drafts, tau an evaluation's time, independent from one to the next; a run's time
without what the leader and the wires add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from drp.leader.scheduling.sharing import FirstComeFirstServed, LoadBalanced, Waiting
from drp.sampling.modes import Eager as EagerRounds
from drp.sampling.modes import Mode
from drp.sampling.modes import Rolling as RollingWindow


@dataclass(frozen=True)
class Policy:
    """What a policy decides; one of one's own overrides what it changes (examples/own_policy.py).

    `schedule` may put another mode in the place of the one that was asked for: it says what drafts are made of, and so
    what they wait for. The samples depend on that alone. `choose` says whose draft a free worker gets. `hedge`: a draft
    that takes this many times the usual is given to an idle worker too, and the first answer counts. `depth`: drafts
    that a worker has at most while there is one run alone; with 2 the second spares it a wait for the leader.
    """

    hedge: float | None = None
    depth: int = 2

    def schedule(self, mode: Mode) -> Mode:
        """Return the mode that takes the place of `mode`."""
        return mode

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return the run whose next draft worker `worker` of `workers` evaluates; `runs` are oldest first."""
        return FirstComeFirstServed().choose(worker, workers, runs)


@dataclass(frozen=True)
class Barrier(Policy):
    """Rounds: the next drafts go out when the last prediction of a round is in. It is what the mode says.

    A round takes the largest of its n times: with R rounds a run takes R E[max of n], for normally distributed times of
    standard deviation s about R (tau + s sqrt(2 ln n)). If a share p of the evaluations takes f times as long, a round
    does with probability 1 - (1 - p)^n, and the run loses that many times R (f - 1) tau.
    """


@dataclass(frozen=True)
class Eager(Policy):
    """Each draft goes out as soon as what it is made of is there. The samples are those of the mode asked for.

    In sweeps, the draft at place j of a block waits for those before it alone: a block of n with s sweeps takes the
    slowest sequence of s evaluations whose places do not fall, which is at most the sum of the s slowest. In the
    aggressive and the conservative mode every draft is made of all predictions: it is the barrier, and takes as long.
    """

    def schedule(self, mode: Mode) -> Mode:
        """Return the mode with its rounds divided."""
        return EagerRounds(mode)


@dataclass(frozen=True)
class Rolling(Policy):
    """A window of as many drafts as the mode has, without a barrier: `drp.sampling.modes.Rolling` in its place.

    A run takes the slowest sequence of evaluations whose indices lie at least n apart, of which there are at most
    1 + ceil((N - 1) / n). A barrier may take the slowest of each block, whichever they are; here one that is slow holds
    up only what lies n and more behind it, so slow evaluations less than n apart cost once. With rare stragglers of f
    times the time, few lie so near: each costs (f - 1) tau, as with a barrier. With m more drafts than devices the
    others go on meanwhile for m / (devices - 1) tau, at the price of drafts that are m further ahead. No draft is given
    to a worker in advance: it would wait there for a slow one, while others are idle.
    """

    depth: int = 1

    def schedule(self, mode: Mode) -> Mode:
        """Return a window of the mode's width, with its rule."""
        return RollingWindow(mode.width, mode.rule)


@dataclass(frozen=True)
class Hedged(Policy):
    """A barrier, but what is late is also given to an idle worker.

    A draft that takes f times as long is answered after min(f, h + 1) tau, h being `hedge`: of the (f - 1) tau that a
    barrier loses, h tau are lost. For f = 3 and h just above 1 that is half: until one tau has passed nobody knows. The
    device that is late goes on computing what nobody needs. With a draft a device the next round lacks it, and has lost
    what this one gained; hedging wants a device to spare, or a window. Devices compute a draft more for each that is
    later than h tau: with normal times, a share 1 - Phi((h - 1) tau / s) of all.
    """

    hedge: float | None = 1.25


@dataclass(frozen=True)
class RollingHedged(Rolling):
    """A window whose late drafts are also given to an idle worker.

    The window goes on while a device is late, and while that device computes what nobody needs, without a round that
    wants all devices. What is left is the time that N evaluations and those made twice take on all devices: 50 steps on
    8 devices leave 7 evaluations' room in 8 tau, 48 steps one in 7 tau.
    """

    hedge: float | None = 1.25


@dataclass(frozen=True)
class LoadAdaptive(Policy):
    """All workers on the oldest run while there are fewer runs than workers; beyond that, a run a worker.

    Drafts spread over n devices make a run about n times as fast, and leave devices idle for what rounds wait: for the
    slowest, the leader and the wires. Drafts of a run on one device leave none idle, for each evaluation is needed
    anyway: throughput is devices / (N tau), which spreading reaches only as far as other runs fill its gaps. Below that
    load latency counts, above it throughput: a queue grows without bounds as soon as more arrives than is served.
    """

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return what the policy for this load chooses."""
        return LoadBalanced().choose(worker, workers, runs)


POLICIES: dict[str, Policy] = {
    "barrier": Barrier(),
    "eager": Eager(),
    "rolling": Rolling(),
    "hedged": Hedged(),
    "rolling-hedged": RollingHedged(),
    "load-adaptive": LoadAdaptive(),
}


def find_policy(policy: str | Policy) -> Policy:
    """Return the policy of that name, or the one given; raise ValueError if there is none."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; choose one of {', '.join(POLICIES)}, or give a Policy")
    return POLICIES[policy]
