"""The leader: owns all shared memory, runs the rounds, watches the workers."""

from drp.errors import WorkerError
from drp.leader.leader import Leader
from drp.leader.memory.placement import GpuOptions

__all__ = ["GpuOptions", "Leader", "WorkerError"]
