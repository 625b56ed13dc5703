"""Denoisers for GPUs: small, and such that a graph can be captured."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from drp import ModelSpec


class Small(nn.Module):
    """A few convolutions with seeded weights."""

    spec = ModelSpec(sample_shape=(4, 32, 32))

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.layers = nn.Sequential(
            nn.Conv2d(4, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, 4, 1)
        )
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g) * 0.05

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = self.layers(x * (1 - t.to(x.dtype) / 2000)[:, None, None, None])
        return out

    def examples(self) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        return [(torch.zeros(1, 4, 32, 32), torch.zeros(1), {})]


class Dying(Small):
    """Ends its process by force in the middle of a run, once: the file says that it did."""

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        path = os.environ["DRP_TEST_DIED"]
        if float(t[0]) and float(t[0]) < 500 and not os.path.exists(path):  # noqa: PTH110  # a name from the environment
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x, t, cond)


class Large(Small):
    """A GiB of weights, next to none of them used."""

    spec = ModelSpec(sample_shape=(4,))

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.full((1 << 14, 1 << 14), 0.5))

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return x * self.weight[7, 9]

    def examples(self) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        return [(torch.zeros(1, 4), torch.zeros(1), {})]


class Few(Large):
    """The same without the weights."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.full((16, 16), 0.5))


class Drawn(Small):
    """Other weights in each process, made on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        torch.seed()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, device="cuda") * 0.05


class Looking(Small):
    """Looks at a number on the host, which a graph cannot."""

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return super().forward(x, t, cond) * float(t[0] > -1)
