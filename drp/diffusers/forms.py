"""Forms: how a tensor that a pipeline hands to its denoiser follows from the latents, or from the timestep.

They are recognised once, at the first step of a pipeline's call, where the tensor, the latents and the timestep are all
known, and by equality of every bit. They are verified at every step after it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Scale = Callable[[Tensor], Tensor]
"""The scheduler's `scale_model_input` at some step."""


@dataclass(frozen=True)
class OfState:
    """The latents [B, ...], perhaps scaled, cast, and repeated along the batch.

    axis, offset: they are a part of the tensor, from `offset` along `axis`; the rest stays the same (inpainting's mask
        and masked image, the tokens of a reference image).
    item: only this sample of the batch, for pipelines that hand over a list.
    """

    scaled: bool
    repeats: int = 1
    axis: int | None = None
    offset: int = 0
    item: int | None = None

    def apply(self, x: Tensor, scale: Scale, like: Tensor) -> Tensor:
        """Return the tensor that the latents `x` lead to; `like` is one of the same form, for what stays the same."""
        y = (scale(x) if self.scaled else x).to(like.dtype)
        if self.item is not None:
            return y[self.item].reshape(like.shape)
        y = _repeat(y, self.repeats)
        if self.axis is None:
            return y.reshape(like.shape)
        out = like.clone()
        out.narrow(self.axis, self.offset, y.shape[self.axis]).copy_(y)
        return out

    def read(self, tensor: Tensor, x: Tensor, scale: Scale) -> Tensor:
        """Return the latents in a tensor of this form, like `x`, to rounding: the reverse of `apply`."""
        if self.axis is not None:
            tensor = tensor.narrow(self.axis, self.offset, x.shape[self.axis])
        y = tensor.reshape(self.repeats, *x.shape)[0].to(x.dtype)
        return y / scale(torch.ones_like(x)) if self.scaled else y.clone()

    def same_elsewhere(self, like: Tensor, tensor: Tensor, x: Tensor) -> bool:
        """Return whether what is not latents in a tensor is as in `like`."""
        if self.axis is None:
            return True
        size = x.shape[self.axis]
        wanted = like.clone()
        wanted.narrow(self.axis, self.offset, size).copy_(tensor.narrow(self.axis, self.offset, size))
        return torch.equal(wanted, tensor)


def _repeat(y: Tensor, times: int) -> Tensor:
    return y if times == 1 else y.repeat(times, *[1] * (y.dim() - 1))


def of_state(tensor: Tensor, x: Tensor, scale: Scale) -> OfState | None:
    """Return the form in which `tensor` holds the latents `x`, None if it does not."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or x.dim() == 0:
        return None
    return next((form for form in _candidates(tensor, x) if _same(tensor, form, x, scale)), None)


def _candidates(tensor: Tensor, x: Tensor) -> Iterator[OfState]:
    for scaled in (False, True):
        if tensor.numel() % x.numel() == 0:
            yield OfState(scaled, tensor.numel() // x.numel())
        if tensor.dim() == x.dim() and tensor.shape[0] % x.shape[0] == 0:
            repeats = tensor.shape[0] // x.shape[0]
            wider = [a for a in range(1, x.dim()) if tensor.shape[a] != x.shape[a]]
            if len(wider) == 1 and tensor.shape[wider[0]] > x.shape[wider[0]]:
                for offset in (0, tensor.shape[wider[0]] - x.shape[wider[0]]):
                    yield OfState(scaled, repeats, wider[0], offset)
        if x.shape[0] > 1 and tensor.numel() * x.shape[0] == x.numel():
            for item in range(x.shape[0]):
                yield OfState(scaled, item=item)


def _same(tensor: Tensor, form: OfState, x: Tensor, scale: Scale) -> bool:
    made = form.apply(x, scale, tensor)
    return torch.equal(made, tensor)


@dataclass(frozen=True)
class OfTime:
    """A number that follows from the timestep, everywhere or, elsewhere being 0, in part of the tensor."""

    name: str
    number: Callable[[Tensor, torch.dtype], Tensor]

    def apply(self, t: Tensor, like: Tensor, part: Tensor | None) -> Tensor:
        """Return the tensor at a timestep; `part` says where it is not 0."""
        number = self.number(t, like.dtype).to(like.dtype)
        return number.expand(like.shape) if part is None else torch.where(part, number, torch.zeros_like(number))


def numbers_of_time(config: Mapping[str, Any]) -> Iterator[OfTime]:
    """Yield what pipelines make of a timestep; `config` is the module's, which may hold a factor."""
    yield OfTime("t", lambda t, d: t)
    for name, factor in config.items():
        if "scale" in name and isinstance(factor, (int, float)) and not isinstance(factor, bool):
            yield OfTime(f"t * {name}", functools.partial(_times, float(factor), False))
            yield OfTime(f"t * {name}, cast first", functools.partial(_times, float(factor), True))
    yield OfTime("t / 1000", lambda t, d: t / 1000)
    yield OfTime("t / 1000, cast first", lambda t, d: t.to(d) / 1000)
    yield OfTime("(1000 - t) / 1000", lambda t, d: (1000 - t) / 1000)
    yield OfTime("(1000 - t) / 1000, cast first", lambda t, d: (1000 - t.to(d)) / 1000)
    yield OfTime("1 - t / 1000", lambda t, d: 1 - t / 1000)


def _times(factor: float, cast: bool, t: Tensor, dtype: torch.dtype) -> Tensor:
    return (t.to(dtype) if cast else t) * factor


def of_time(tensor: Tensor, t: Tensor, config: Mapping[str, Any]) -> tuple[OfTime, Tensor | None] | None:
    """Return how `tensor` follows from the timestep and in what part of it (None: everywhere), None if it does not."""
    if tensor.dtype == torch.bool or tensor.is_complex() or tensor.numel() == 0:
        return None
    for form in numbers_of_time(config):
        if torch.equal(form.apply(t, tensor, None), tensor):
            return form, None
    part = tensor != 0
    if 0 < int(part.sum()) < tensor.numel() and not math.isclose(float(t), 0.0):
        for form in numbers_of_time(config):
            if torch.equal(form.apply(t, tensor, part), tensor):
                return form, part
    return None
