"""Denoisers for GPUs: small, and such that a graph can be captured."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from drp import ModelSpec
from drp.protocol import timeline


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


def once(t: Tensor) -> bool:
    """Whether it is the middle of a run, and nobody has asked before: the file says that somebody has."""
    path = os.environ["DRP_TEST_DIED"]
    if not float(t[0]) or float(t[0]) >= 500 or os.path.exists(path):  # noqa: PTH110  # a name from the environment
        return False
    os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    return True


class Dying(Small):
    """Ends its process by force, once."""

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        if once(t):
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


class Asserting(Small):
    """Reads beyond the end of a tensor, once: the GPU asserts, some time after this has returned."""

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        if once(t):
            x = x + torch.zeros(4, device=x.device)[torch.full((1,), 9, device=x.device)]
        return super().forward(x, t, cond)


class Stale(Small):
    """Has its worker write another draft's stamp, once."""

    def __init__(self) -> None:
        super().__init__()
        from drp.workers import cuda_executor

        cuda_executor.write_completion = self._stamp  # type: ignore[assignment, attr-defined]  # the worker's own name for it

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        self.due = once(t)
        return super().forward(x, t, cond)

    def _stamp(self, place: Tensor, sequence: int, prediction: Iterable[Tensor], took: int = 0) -> None:
        timeline.write_completion(place, sequence - 1 if self.due else sequence, prediction, took)
