"""Sharing policies: which run a free worker serves when several have drafts waiting."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Protocol, TypeVar


class HasDrafts(Protocol):
    """What a policy looks at of a run: the drafts that no worker has been given."""

    @property
    def waiting(self) -> Sized:
        """The drafts."""
        ...


Waiting = TypeVar("Waiting", bound=HasDrafts)


class SharingPolicy(Protocol):
    """A policy. Whatever it chooses, samples are the same: only who waits for whom depends on it."""

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return the run whose next draft worker number `worker` of `workers` evaluates; `runs` are oldest first."""
        ...


class FirstComeFirstServed:
    """Latency: every worker serves the oldest run that has drafts waiting; later runs fill what it leaves idle."""

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return the oldest run with a draft waiting."""
        return next((run for run in runs if run.waiting), None)


class RunAffinity:
    """Throughput: a worker serves one run as long as that has drafts, then the oldest."""

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return the worker's own run, or the oldest with a draft waiting."""
        own = runs[worker] if worker < len(runs) else None
        return own if own is not None and own.waiting else next((run for run in runs if run.waiting), None)


class LoadBalanced:
    """All workers on the oldest run while there are fewer runs than workers; beyond that, a run a worker."""

    def __init__(self) -> None:
        self._few, self._many = FirstComeFirstServed(), RunAffinity()

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return what the policy for this load chooses."""
        policy: SharingPolicy = self._few if len(runs) < workers else self._many
        return policy.choose(worker, workers, runs)
