"""The leader: owns all shared memory, runs the rounds, watches the workers."""

from drp.errors import WorkerError
from drp.leader.ground import GpuOptions
from drp.leader.leader import Leader

__all__ = ["GpuOptions", "Leader", "WorkerError"]
