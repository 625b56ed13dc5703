"""drp itself, its rounds ordered by the host, and by the devices."""

from __future__ import annotations

from torch import Tensor

from bench.transports.base import Transport, Work
from drp import ExecutionOptions, Leader
from drp.leader.devices import Devices

CHEAP = "drp.workers.emulated:load"


class Ours(Transport):
    """ZeroMQ messages in MessagePack, latents in shared memory."""

    name = "drp"
    dispatch = "sync"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        gpu = ExecutionOptions(dispatch=self.dispatch)
        self.leader = Leader(CHEAP, devices=self.make_devices(work), execution=gpu)

    def make_devices(self, work: Work) -> Devices:
        """Return the leader's devices."""
        return [work.device] * work.count

    def sample(self) -> Tensor:
        """Run once."""
        self.leader.timeline = self.timeline = []
        work = self.work
        return self.leader.sample(shape=work.shape, steps=work.steps, mode=work.mode, drafts=work.count).samples

    def close(self) -> None:
        """End the workers."""
        self.leader.close()


class OursAsync(Ours):
    """Likewise, and messages run ahead of the devices, which the memory orders."""

    name = "drp, ahead"
    dispatch = "async"
