"""The arguments of a scheduler's `step` besides the model output, the timestep and the latents, at later steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from drp.diffusers.numbers import Numbers, OfTime, of_time


@dataclass(frozen=True)
class Argument:
    """An argument that follows from the numbers of a step (`form`), or is a result of the previous step."""

    value: Any
    form: OfTime | None = None
    place: int | None = None

    def copied(self) -> Argument:
        """Return the argument with copies of random generators, which draw the same numbers as the originals will."""
        return replace(self, value=_copy_generator(self.value))

    def at(self, numbers: Numbers, stepped: Sequence[Any]) -> Any:
        """Return the value at a step; `stepped` are the results of the previous step."""
        if self.place is not None:
            return stepped[self.place]
        if self.form is None:
            return self.value
        if isinstance(self.value, Tensor):
            return self.form.apply(numbers, self.value)
        return type(self.value)(self.form.apply(numbers, torch.tensor(self.value)))


def argument_of(name: str, value: Any, numbers: Numbers, stepped: Sequence[Any]) -> Argument | None:
    """Return the form of an argument at later steps, given its value at a step; None if it is unknown."""
    if isinstance(value, (Tensor, int, float)) and not isinstance(value, bool):
        place = next((i for i, result in enumerate(stepped) if result is value), None)
        if place is not None:
            return Argument(value, place=place)
        if "time" in name or "sigma" in name:
            form = of_time(value if isinstance(value, Tensor) else torch.tensor(value), numbers, {})
            if form is not None:
                return Argument(value, form)
    return None if isinstance(value, Tensor) else Argument(value)


def results_of(stepped: Any) -> Sequence[Any]:
    """Return the results of a scheduler's step, a tuple or an output of diffusers, as a sequence."""
    return tuple(stepped[i] for i in range(len(stepped)))


def _copy_generator(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy_generator(item) for item in value]
    if isinstance(value, torch.Generator):
        made = torch.Generator(value.device)
        made.set_state(value.get_state())
        return made
    return value
