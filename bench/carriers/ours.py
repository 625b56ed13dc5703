"""drp itself."""

from __future__ import annotations

from torch import Tensor

from bench.carriers.base import Carrier, Work
from drp.leader import Leader

CHEAP = "drp.workers.emulated:load"


class Ours(Carrier):
    """ZeroMQ messages in MessagePack, latents in shared memory."""

    name = "drp"

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self.leader = Leader(CHEAP, devices=[work.device] * work.count)

    def sample(self) -> Tensor:
        """Run once."""
        self.leader.timeline = self.timeline = []
        work = self.work
        return self.leader.sample(shape=work.shape, steps=work.steps, mode=work.mode, drafts=work.count).samples

    def close(self) -> None:
        """End the workers."""
        self.leader.close()
