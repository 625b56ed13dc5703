"""Numbers: what pipelines make of a step's timestep and noise level, and tensors that consist of such numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Numbers = Mapping[str, Tensor]
"""The numbers of one step, of no dimension, on the host: "t", "sigma", and those of the steps before and after it."""

MOST_VALUES = 4
"""How many different values a tensor may have that is looked at for numbers of time."""


@dataclass(frozen=True)
class Number:
    """A number that follows from one of a step's, `base`."""

    name: str
    base: str
    make: Callable[[Tensor, torch.dtype], Tensor]

    def at(self, numbers: Numbers, dtype: torch.dtype) -> Tensor:
        """Return the number at a step, in a dtype."""
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
"""Those that a tensor of whole numbers is looked at for."""


def numbers_of(numbers: Numbers, config: Mapping[str, Any]) -> Iterator[Number]:
    """Yield what pipelines make of a step's numbers; `config` is the module's, which may hold factors.

    Those of the step itself come first: near the end a number may be two things.
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
    """A tensor of numbers that follow from the step, each in a part of it (None: everywhere); the rest stays."""

    parts: tuple[tuple[Number, Tensor | None], ...]

    def apply(self, numbers: Numbers, like: Tensor) -> Tensor:
        """Return the tensor at a step."""
        out = like
        for number, part in self.parts:
            value = number.at(numbers, like.dtype)
            # On a GPU the number goes with the launch: nothing is copied, and nobody waits.
            out = like.new_full(like.shape, value.item()) if part is None else torch.where(part, value, out)
        return out


def of_time(
    tensor: Tensor, numbers: Numbers, config: Mapping[str, Any], refuted: Collection[str] = ()
) -> OfTime | None:
    """Return how a tensor follows from a step's numbers, None if it does not. `refuted` are names of wrong guesses."""
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
            continue  # A part that is left out, and not a time that happens to be 0.
        number = next((n for n, v in known if torch.equal(v, value)), None)
        number = number or next((n for n, v in known if alike(v, value)), None)
        if number is not None:
            parts.append((number, tensor == value if len(values) > 1 else None))
        elif whole:
            return None  # labels or indices, one of which happens to be a timestep
    return OfTime(tuple(parts)) if parts else None


def alike(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape and dtype are the same but for rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):
        return True
    if not a.is_floating_point() or a.numel() == 0:
        return False
    size = float(b.abs().max())
    return math.isfinite(size) and float((a.double() - b.double()).abs().max()) <= tolerance(a.dtype) * size


def tolerance(dtype: torch.dtype) -> float:
    """Return how far numbers that were computed in another order may be apart, relative to the largest."""
    return 32 * torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps if dtype.is_floating_point else 0.0
