"""Numbers that pipelines derive from a step's timestep and noise level, and tensors of such numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Numbers = Mapping[str, Tensor]
"""The numbers of one step, scalar tensors on the host: "t", "sigma", and those of the previous and next steps."""

MOST_VALUES = 4
"""The maximum number of distinct values of a tensor that is searched for such numbers."""


@dataclass(frozen=True)
class Number:
    """A number that follows from a number `base` of a step."""

    name: str
    base: str
    make: Callable[[Tensor, torch.dtype], Tensor]

    def at(self, numbers: Numbers, dtype: torch.dtype) -> Tensor:
        return self.make(numbers[self.base], dtype).to(dtype)


def _times(factor: float, cast: bool, b: Tensor, dtype: torch.dtype) -> Tensor:
    return (b.to(dtype) if cast else b) * factor


OF_TIME: Mapping[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "{}": lambda b, d: b,
    "{} / 1000": lambda b, d: b / 1000,
    "{} / 1000, cast first": lambda b, d: b.to(d) / 1000,
    "(1000 - {}) / 1000": lambda b, d: (1000 - b) / 1000,
    "(1000 - {}) / 1000, cast first": lambda b, d: (1000 - b.to(d)) / 1000,
    "1 - {} / 1000": lambda b, d: 1 - b / 1000,
    "1000 - {}": lambda b, d: 1000 - b,
}
OF_SIGMA: Mapping[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "{}": lambda b, d: b,
    "1 - {}": lambda b, d: 1 - b,
    "1000 {}": lambda b, d: b * 1000,
    "{0} / ({0} + 1)": lambda b, d: b / (b + 1),
    "1 - {0} / ({0} + 1)": lambda b, d: 1 - b / (b + 1),
    "1 / ({} + 1)": lambda b, d: 1 / (b + 1),
    "1 / sqrt({}^2 + 1)": lambda b, d: 1 / (b * b + 1).sqrt(),
    "{0} / sqrt({0}^2 + 1)": lambda b, d: b / (b * b + 1).sqrt(),
    "log({}) / 4": lambda b, d: b.clamp_min(1e-30).log() / 4,
}

WHOLE = ("t", "next t", "last t")
"""The numbers that an integer tensor may contain."""


def numbers_of(numbers: Numbers, config: Mapping[str, Any]) -> Iterator[Number]:
    """Yield the numbers that pipelines derive from a step's; `config` is the module's, which may have factors.

    The step's own numbers come first, since near the end two numbers may be equal.
    """
    factors = [
        (name, float(value))
        for name, value in config.items()
        if "scale" in name and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    for base in sorted(numbers, key=lambda name: name not in ("t", "sigma")):
        for name, make in (OF_TIME if base.endswith("t") else OF_SIGMA).items():
            yield Number(name.format(base), base, make)
        for name, factor in factors:
            yield Number(f"{base} * {name}", base, functools.partial(_times, factor, False))
            yield Number(f"{base} * {name}, cast first", base, functools.partial(_times, factor, True))


@dataclass(frozen=True)
class OfTime:
    """A tensor of numbers that follow from the step, each in a part of it (None: everywhere); the rest is constant."""

    parts: tuple[tuple[Number, Tensor | None], ...]

    def apply(self, numbers: Numbers, like: Tensor) -> Tensor:
        out = like
        for number, part in self.parts:
            value = number.at(numbers, like.dtype)
            # A number is passed with the kernel launch on a GPU, without a copy or a synchronization.
            out = like.new_full(like.shape, value.item()) if part is None else torch.where(part, value, out)
        return out


def of_time(
    tensor: Tensor, numbers: Numbers, config: Mapping[str, Any], refuted: Collection[str] = ()
) -> OfTime | None:
    """Return the form of a tensor of a step's numbers, None if it is none. `refuted` names numbers to exclude."""
    if tensor.dtype == torch.bool or tensor.is_complex() or tensor.numel() == 0:
        return None
    first = tensor.flatten()[0]
    values = (first[None] if bool((tensor == first).all()) else torch.unique(tensor)).cpu()
    if len(values) > MOST_VALUES:
        return None
    whole = not tensor.is_floating_point()
    known = [
        (number, number.at(numbers, tensor.dtype))
        for number in numbers_of(numbers, config)
        if number.name not in refuted and not (whole and number.name not in WHOLE)
    ]
    parts: list[tuple[Number, Tensor | None]] = []
    for value in values:
        if len(values) > 1 and float(value) == 0.0:
            continue  # A constant part, not a timestep that happens to be 0.
        number = next((n for n, v in known if torch.equal(v, value)), None)
        number = number or next((n for n, v in known if alike(v, value)), None)
        if number is not None:
            parts.append((number, tensor == value if len(values) > 1 else None))
        elif whole:
            return None  # labels or indices, one of which equals a timestep by coincidence
    return OfTime(tuple(parts)) if parts else None


def alike(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of the same shape and dtype are equal up to rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not a.is_floating_point() or a.numel() == 0:
        return False
    size = float(b.abs().max())
    return math.isfinite(size) and float((a.double() - b.double()).abs().max()) <= tolerance(a.dtype) * size


def tolerance(dtype: torch.dtype) -> float:
    """Return the tolerance for numbers computed in another order, relative to the largest."""
    return 32 * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps if dtype.is_floating_point else 0.0
