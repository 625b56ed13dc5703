"""Forms: how an argument of a denoiser follows from the latents.

A form is recognised by comparing the values of the arguments with the latents at one step. It is verified at every
later step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drp.diffusers.numbers import Number, Numbers, numbers_of, tolerance

Scale = Callable[[Tensor], Tensor]
"""The scheduler's `scale_model_input` at a step."""

FEW = 16
"""The number of bit-identical nonzero values that count as a match."""
SAMPLE = 4096
"""The number of values in which a factor is searched for."""


@dataclass(frozen=True)
class Point:
    """A step of a pipeline's call: its latents and its numbers."""

    x: Tensor
    scale: Scale
    numbers: Numbers


@dataclass(frozen=True)
class LatentScaling:
    """A scaling of the latents: none, that of the scheduler, or by a number of the step."""

    scaled: bool = False
    factor: Number | None = None

    def at(self, point: Point) -> Tensor:
        """Return the latents at a step, scaled."""
        if self.factor is not None:
            return point.x * self.factor.at(point.numbers, _working(point.x.dtype))
        return point.scale(point.x) if self.scaled else point.x

    def undo(self, y: Tensor, point: Point) -> Tensor:
        """Return the latents whose scaling is y."""
        if self.factor is not None:
            return y / self.factor.at(point.numbers, _working(point.x.dtype))
        return y / point.scale(torch.ones_like(y)) if self.scaled else y.clone()


@dataclass(frozen=True)
class OfState:
    """The latents [B, ...], perhaps scaled, cast, and repeated along the batch.

    axis, offset: the latents are the part of the tensor from `offset` along `axis`. The rest is constant, such as the
        mask and the masked image of inpainting, or the tokens of a reference image.
    item: only this sample of the batch, for pipelines that pass a list.
    part: where the tensor, which has the shape of the latents, contains latents. The rest is constant, such as the
        first frames of a video.
    places: for each number of the tensor its place in the latents, -1 if it is constant. The latents may be packed,
        folded, transposed, or a selection.
    """

    source: LatentScaling = LatentScaling()
    repeats: int = 1
    axis: int | None = None
    offset: int = 0
    item: int | None = None
    part: Tensor | None = None
    places: Tensor | None = None

    def apply(self, point: Point, like: Tensor) -> Tensor:
        """Return the tensor for these latents; its constant parts are those of `like`."""
        y = self.source.at(point).to(like.dtype)
        if self.places is not None:
            return torch.where(self.places < 0, like.reshape(-1), y.reshape(-1)[self.places]).reshape(like.shape)
        if self.item is not None:
            return y[self.item].reshape(like.shape)
        y = _repeat(y, self.repeats)
        if self.axis is not None:
            out = like.clone()
            out.narrow(self.axis, self.offset, y.shape[self.axis]).copy_(y)
            return out
        y = y.reshape(like.shape)
        return y if self.part is None else torch.where(self.part, y, like)

    def read(self, tensor: Tensor, point: Point) -> Tensor:
        """Return the latents in a tensor of this form, up to rounding: the inverse of `apply`.

        Latents that the tensor does not contain are taken from `point.x`.
        """
        x = point.x
        y = self.source.at(point).clone()
        if self.item is not None:
            y[self.item] = tensor.reshape(y[self.item].shape).to(y.dtype)
        elif self.places is not None:
            held = self.places >= 0
            y.view(-1)[self.places[held]] = tensor.reshape(-1)[held].to(y.dtype)
        else:
            if self.axis is not None:
                tensor = tensor.narrow(self.axis, self.offset, x.shape[self.axis])
            held_part = None if self.part is None else self.part.reshape(self.repeats, *x.shape)[0]
            first = tensor.reshape(self.repeats, *x.shape)[0].to(y.dtype)
            y = first if held_part is None else torch.where(held_part, first, y)
        return self.source.undo(y, point).to(x.dtype)


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _repeat(y: Tensor, times: int) -> Tensor:
    return y if times == 1 else y.repeat(times, *[1] * (y.dim() - 1))


def of_state(tensor: Tensor, point: Point, config: Mapping[str, Any]) -> OfState | None:
    """Return the form of a tensor that contains the latents, None if it does not."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or point.x.dim() == 0:
        return None
    if tensor.device != point.x.device:  # such as a noise level that stays on the host
        return None
    sources = (LatentScaling(), LatentScaling(scaled=True))
    for source in sources:
        for form in _whole(tensor, point.x, source):
            if torch.equal(form.apply(point, tensor), tensor):
                return form
    for source in sources:
        found = _in_places(tensor, point, source) or _in_part(tensor, point, source)
        if found is not None:
            return found
    return _times_a_number(tensor, point, config)


def _whole(tensor: Tensor, x: Tensor, source: LatentScaling) -> Iterator[OfState]:
    """Yield the possible forms of a tensor that contains all latents."""
    if tensor.numel() % x.numel() == 0:
        yield OfState(source, tensor.numel() // x.numel())
    if tensor.dim() == x.dim() and tensor.shape[0] % x.shape[0] == 0:
        repeats = tensor.shape[0] // x.shape[0]
        wider = [a for a in range(1, x.dim()) if tensor.shape[a] != x.shape[a]]
        if len(wider) == 1 and tensor.shape[wider[0]] > x.shape[wider[0]]:
            for offset in (0, tensor.shape[wider[0]] - x.shape[wider[0]]):
                yield OfState(source, repeats, wider[0], offset)
    if x.shape[0] > 1 and tensor.numel() * x.shape[0] == x.numel():
        for item in range(x.shape[0]):
            yield OfState(source, item=item)


def _in_part(tensor: Tensor, point: Point, source: LatentScaling) -> OfState | None:
    """Return the form of a tensor whose shape is that of the latents and which contains a part of them."""
    if tensor.numel() % point.x.numel():
        return None
    repeats = tensor.numel() // point.x.numel()
    made = _repeat(source.at(point), repeats).reshape(tensor.shape)
    exact = source.factor is None
    made = made.to(tensor.dtype)
    same = made == tensor if exact else (made - tensor).abs() <= tolerance(tensor.dtype) * (tensor.abs() + 1e-6)
    if not _enough(same, tensor, point.x):
        return None
    return OfState(source, repeats, part=None if bool(same.all()) else same)


def _enough(same: Tensor, tensor: Tensor, x: Tensor) -> bool:
    """Return whether enough values match to rule out a coincidence."""
    count = int((same & (tensor != 0)).sum())
    return count >= min(FEW, x.numel()) and 10 * count >= x.numel()


def _in_places(tensor: Tensor, point: Point, source: LatentScaling) -> OfState | None:
    """Return the form of a tensor that contains the latents in another order.

    They are found by their values, which is not possible in dtypes of low precision, where many values are equal.
    """
    y = source.at(point).to(tensor.dtype).reshape(-1)
    if tensor.dtype not in (torch.float32, torch.float64) or y.numel() < FEW:
        return None
    ordered, order = y.sort()
    values = tensor.reshape(-1)
    at = torch.searchsorted(ordered, values).clamp_max(len(ordered) - 1)
    found = ordered[at] == values
    alone = ordered.diff().ne(0)  # from the one before
    alone = torch.cat([alone.new_ones(1), alone]) & torch.cat([alone, alone.new_ones(1)])
    if not _enough(found & alone[at], values, y):
        return None
    places = torch.where(found, order[at], -1)
    if values.numel() % y.numel() == 0:  # Of several equal numbers, prefer the one at the same place.
        here = torch.arange(y.numel(), device=y.device).repeat(values.numel() // y.numel())
        places = torch.where(y[here] == values, here, places)
    return OfState(source, places=places)


def _times_a_number(tensor: Tensor, point: Point, config: Mapping[str, Any]) -> OfState | None:
    """Return the form of a tensor that is a multiple of the latents by a number of the step."""
    x = point.x
    if tensor.numel() % x.numel():
        return None
    some = _repeat(x, tensor.numel() // x.numel()).reshape(-1)
    spread = torch.linspace(0, some.numel() - 1, min(SAMPLE, some.numel()), device=x.device).long()
    some, wanted = some[spread], tensor.reshape(-1)[spread]
    for number in numbers_of(point.numbers, config):
        made = (some * number.at(point.numbers, _working(x.dtype))).to(wanted.dtype)
        close = (made - wanted).abs() <= tolerance(tensor.dtype) * wanted.abs()
        if _enough(close, wanted, wanted):
            return _in_part(tensor, point, LatentScaling(factor=number))
    return None
