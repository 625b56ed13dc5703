"""Sharing policies: which run a free worker serves when several have drafts waiting."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Protocol, TypeVar


class HasDrafts(Protocol):
    """A run as a policy sees it: its drafts that are not assigned to a worker."""

    @property
    def waiting(self) -> Sized:
        """The unassigned drafts."""
        ...


Waiting = TypeVar("Waiting", bound=HasDrafts)


class SharingPolicy(Protocol):
    """A sharing policy. It affects only how long runs wait, never their samples."""

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return the run whose next draft worker number `worker` of `workers` evaluates; `runs` are oldest first."""
        ...


class FirstComeFirstServed:
    """For latency: every worker serves the oldest run with waiting drafts. Later runs use otherwise idle workers."""

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return the oldest run with a draft waiting."""
        return next((run for run in runs if run.waiting), None)


class RunAffinity:
    """For throughput: each worker serves its own run while that has waiting drafts, else the oldest."""

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return the worker's own run, or the oldest with a draft waiting."""
        own = runs[worker] if worker < len(runs) else None
        return own if own is not None and own.waiting else next((run for run in runs if run.waiting), None)


class LoadBalanced:
    """FirstComeFirstServed while there are fewer runs than workers, else RunAffinity."""

    def __init__(self) -> None:
        self._few, self._many = FirstComeFirstServed(), RunAffinity()

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        """Return the choice of the policy for the current load."""
        policy: SharingPolicy = self._few if len(runs) < workers else self._many
        return policy.choose(worker, workers, runs)
