"""Policies: when drafts are sent, to which worker, and whether to a second one.

The same objects drive the engine and the simulator. Notation: N steps, n drafts per round, tau the time of an
evaluation; evaluation times are independent. Run times exclude the overhead of the leader and of communication.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Protocol, TypeVar

from drp.sampling.mode_wrappers import EagerRounds
from drp.sampling.modes import Mode
from drp.sampling.modes import Rolling as RollingWindow


class HasDrafts(Protocol):
    """A run as a policy sees it: its drafts that are not assigned to a worker."""

    @property
    def waiting(self) -> Sized:
        """The unassigned drafts."""
        ...


Waiting = TypeVar("Waiting", bound=HasDrafts)

has_waiting = operator.attrgetter("waiting")
"""Whether a run has drafts that are not assigned to a worker."""


@dataclass(frozen=True)
class Policy:
    """Base class of policies. A custom policy overrides what it changes (examples/own_policy.py).

    `schedule` may replace the requested mode. The mode determines which predictions a draft depends on, and the samples
    depend on the mode only. `choose` selects the run whose draft a free worker evaluates: it affects how
    long runs wait, never their samples.

    hedge: a draft that takes this many times the median latency is sent to an idle worker as well; the first prediction
        to arrive is used. With None, a draft is sent to a second worker only when the first one is lost. Runs under a
        policy that hedges are dispatched synchronously.
    depth: the maximum number of batches of a worker while there is only one run. With 2, a worker does not have to wait
        for the leader between evaluations.

    Raises ValueError for an invalid `hedge` or `depth`.
    """

    hedge: float | None = None
    depth: int = 2

    def __post_init__(self) -> None:
        if self.hedge is not None and not 1 < self.hedge < math.inf:
            raise ValueError(f"hedge is {self.hedge}; give a factor above 1, such as 1.5, or None")
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 1:
            raise ValueError(f"depth is {self.depth!r}; give a whole number of at least 1")

    def schedule(self, mode: Mode) -> Mode:
        """Return the mode to use in place of `mode`."""
        return mode

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return the run whose next draft worker `worker` of `workers` evaluates; `runs` are oldest first."""
        return next(filter(has_waiting, runs), None)


@dataclass(frozen=True)
class Barrier(Policy):
    """Rounds with a barrier: the next drafts are sent when the last prediction of a round has arrived.

    The mode is unchanged. A round takes the maximum of its n evaluation times: a run of R rounds takes R E[max of n],
    which for normally distributed times with standard deviation s is about R (tau + s sqrt(2 ln n)). If a share p of
    the evaluations takes f times as long, a round is slow with probability 1 - (1 - p)^n, and the run loses
    R (f - 1) tau times this probability.
    """


@dataclass(frozen=True)
class Eager(Policy):
    """Each draft is sent as soon as the predictions that it depends on are there. The samples are unchanged.

    In Picard sweeps, the draft at position j of a block depends only on the positions before it: a block of n drafts
    with s sweeps takes the slowest sequence of s evaluations at non-decreasing positions, which is at most the sum of
    the s slowest. In the aggressive and the conservative mode every draft depends on all predictions, so the policy
    equals the barrier.
    """

    def schedule(self, mode: Mode) -> Mode:
        return EagerRounds(mode)


@dataclass(frozen=True)
class Rolling(Policy):
    """A rolling window of the mode's width, without a barrier: replaces the mode by `drp.sampling.modes.Rolling`.

    A run takes the slowest sequence of evaluations whose indices are at least n apart, which has at most
    1 + ceil((N - 1) / n) evaluations. With a barrier, the slowest evaluation of every block counts. Here a slow
    evaluation delays only indices that are n or more further, so slow evaluations less than n apart cost only once.
    Rare stragglers that take f times as long are seldom so near to each other: each costs (f - 1) tau, as with a
    barrier. With m more drafts than devices the other devices can continue for m / (devices - 1) tau in the meantime,
    at the price of drafts that are m steps further ahead. No draft is queued at a busy worker, where it could wait for
    a slow evaluation while other workers are idle.
    """

    depth: int = 1

    def schedule(self, mode: Mode) -> Mode:
        return RollingWindow(mode.width, mode.rule)


@dataclass(frozen=True)
class Hedged(Policy):
    """A barrier with hedging: late drafts are also sent to an idle worker.

    With h = `hedge`, the prediction of a draft that takes f times as long arrives after min(f, h + 1) tau: the run
    loses h tau instead of the barrier's (f - 1) tau. For f = 3 and h slightly above 1 that is half, since lateness
    shows only after one tau. The late device continues to compute a prediction that is no longer needed. With one draft
    per device it is then missing in the next round, which loses what this round gained, so hedging needs a spare device
    or a window.
    Each evaluation that takes longer than h tau causes an additional one: with normally distributed times, a share
    1 - Phi((h - 1) tau / s) of all evaluations.
    """

    hedge: float | None = 1.25


@dataclass(frozen=True)
class RollingHedged(Rolling):
    """A rolling window with hedging: late drafts are also sent to an idle worker.

    No round needs all devices, so the window advances while a device is late and while that device computes a
    prediction that is no longer needed. The remaining limit is the time that N evaluations and the additional ones take
    on all devices. The first evaluation is made alone, so with 8 devices, 50 steps leave room for 7 additional
    evaluations in 8 tau, and 48 steps for 1 in 7 tau.
    """

    hedge: float | None = 1.25


@dataclass(frozen=True)
class RunAffinity(Policy):
    """For throughput: each worker serves its own run while that has waiting drafts, else the oldest."""

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        own = runs[worker] if worker < len(runs) else None
        return own if own is not None and own.waiting else super().choose(worker, workers, runs)


@dataclass(frozen=True)
class LoadAdaptive(RunAffinity):
    """All workers serve the oldest run while there are fewer runs than workers; otherwise each worker serves one run.

    This is the default.
    Spreading a run's drafts over n devices makes the run about n times as fast, but devices are idle while a round
    waits for its slowest evaluation, for the leader and for communication. A run on a single device leaves that device
    never idle, since every evaluation is needed: the throughput is devices / (N tau) runs per second, which spreading
    reaches only if other runs fill its gaps. Below that load latency matters, and above it throughput, because the
    queue grows without bound once more runs arrive than are served.
    """

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return the oldest run with a draft waiting, or, if there are as many runs as workers, the worker's own."""
        if workers <= len(runs) and runs[worker].waiting:
            return runs[worker]
        return next(filter(has_waiting, runs), None)


POLICIES: dict[str, Policy] = {
    "barrier": Barrier(),
    "eager": Eager(),
    "rolling": Rolling(),
    "hedged": Hedged(),
    "rolling-hedged": RollingHedged(),
    "run-affinity": RunAffinity(),
    "load-adaptive": LoadAdaptive(),
}


def find_policy(policy: str | Policy) -> Policy:
    """Return the policy with this name, or a given policy itself; raise ValueError for an unknown one."""
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; choose one of {', '.join(POLICIES)}, or give a Policy")
    return POLICIES[policy]
