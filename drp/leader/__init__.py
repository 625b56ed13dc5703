"""The leader: owns all shared memory, runs the rounds, watches the workers."""

from drp.errors import WorkerError
from drp.leader.execution import ExecutionOptions
from drp.leader.leader import Leader
from drp.leader.options import LeaderOptions

__all__ = ["ExecutionOptions", "Leader", "LeaderOptions", "WorkerError"]
