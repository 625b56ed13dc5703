"""The choice between synchronous and asynchronous runs."""

from __future__ import annotations

from drp.leader.runs.async_run import AsyncRun
from drp.leader.runs.submission import RunConfig, Submission
from drp.leader.runs.sync_run import SyncRun


def make_run(submission: Submission, config: RunConfig) -> SyncRun:
    """Create the run for a submission."""
    return (AsyncRun if config.dispatch == "async" else SyncRun)(submission, config)
