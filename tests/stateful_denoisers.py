"""Layers whose results depend on more than their arguments, or that change something beside their results."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

strength = 1.0
evaluations = 0


class Around(nn.Module):
    """A layer of a pipeline's own, times a factor."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls, self.factor = inner, 0, torch.ones(1)
        self.array = np.ones(1)
        self.register_buffer("scale", torch.ones(1))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * self.factor * self.scale * float(self.array[0])
        return out


class CountingInBuffer(Around):
    def forward(self, x: Tensor) -> Tensor:
        self.scale *= 1.1
        return super().forward(x)


class CountingInTensor(Around):
    def forward(self, x: Tensor) -> Tensor:
        self.factor *= 1.1
        return super().forward(x)


class CountingInNumber(Around):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * 1.1**self.calls


class CountingInArray(Around):
    """Counts in what has no attributes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.counts = np.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.counts += 1
        return super().forward(x) * 1.1 ** int(self.counts[0])


class DrawingItself(Around):
    """Draws from a generator of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.rand(1, generator=self.generator)


class DrawingFromNumpy(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * float(np.random.rand())


class DrawingFromPython(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * random.random()


class OfClass(Around):
    strength = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.strength


class CountingInClass(Around):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        CountingInClass.count += 1
        return super().forward(x) * 1.1**CountingInClass.count


class CountingInModule(Around):
    def forward(self, x: Tensor) -> Tensor:
        global evaluations
        evaluations += 1
        return super().forward(x) * 1.1**evaluations


class OfModule(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * strength


class OfEnvironment(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(os.environ.get("STRENGTH", "1"))


class OfCore(Around):
    """Has other results in the workers that do not run on this process's first core."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.core = min(os.sched_getaffinity(0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if self.core in os.sched_getaffinity(0) else 0.9)


class Recording(Around):
    """Keeps a number of its last evaluation for its user."""

    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.seen = out.mean()
        return out


class RecordingInBuffer(Around):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        self.seen.copy_(out.mean())
        return out


class WithNumber(UNet2DConditionModel):  # type: ignore[misc]  # diffusers has no types
    """Returns a number beside its prediction."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        out = super().forward(*args, **kwargs).sample
        return out, float(out.mean())


class WritingToTensor(UNet2DConditionModel):  # type: ignore[misc]  # likewise
    def forward(self, *args: Any, store: list[Tensor], **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        store[0].copy_(out.sample.mean())
        return out


class WritingToList(UNet2DConditionModel):  # type: ignore[misc]  # likewise
    def forward(self, *args: Any, store: list[Tensor], **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        store.append(out.sample.mean())
        return out


class CountingLater(Around):
    """Counts from a timestep on. It is a layer that takes timesteps."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += float(x[0]) < 500
        return super().forward(x) * 1.1**self.calls


class AveragingLater(Around):
    """Averages in a buffer from a timestep on, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if float(x[0]) < 500:
            self.scale.lerp_(out.mean(), 0.5)
        return out


class CachingBySize(Around):
    """Keeps a factor for each size of a batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.factors: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factors.setdefault(len(x), torch.full((1,), 1.1))


class Caching(Around):
    """Fills a cache when it is first evaluated."""

    def forward(self, x: Tensor) -> Tensor:
        if self.calls == 0:
            self.calls, self.factor = 1, torch.full((1,), 1.1)
        return super().forward(x)
