"""Drafting: the next states of a pipeline's call, by stepping a copy of its scheduler with what a rule assumes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drp.diffusers.forms import Scale
from drp.diffusers.learned import UnrecognisedError
from drp.diffusers.scheduler import Levels, copy_generators, copy_of
from drp.sampling.drafts import DraftRule

OWN = ("step", "set_timesteps")
"""Attributes of a scheduler that are ours while a pipeline is parallelised."""
KNOWN = ("model_output", "timestep", "sample")


def scale_of(scheduler: Any, t: Tensor) -> Scale:
    """Return the scheduler's `scale_model_input` at its present step; what it changes is in `scheduler`."""
    if not hasattr(scheduler, "scale_model_input"):
        return lambda x: x
    return lambda x: scheduler.scale_model_input(x, t)


@dataclass(frozen=True)
class Taken:
    """A step that was taken: the latents before it and the model's output, after guidance."""

    x: Tensor
    output: Tensor


@dataclass(frozen=True)
class DraftState:
    """A draft at an index: the state, and the scheduler's scaling there."""

    index: int
    x: Tensor
    scale: Scale


class Drafter:
    """Makes the drafts of one pipeline's call. Indices are those of the scheduler's timesteps."""

    def __init__(self, scheduler: Any, rule: DraftRule) -> None:
        self.timesteps: Tensor = scheduler.timesteps
        self._scheduler, self._rule = scheduler, rule
        self._kind = type(scheduler)
        self._signature = inspect.signature(self._kind.step)
        self._levels = Levels(scheduler, self.timesteps)
        self._arguments: dict[str, Any] = {}
        self.taken: dict[int, Taken] = {}
        self.base = 0
        self.anchor = 0

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the scheduler's `step` by name.

        Raises UnrecognisedError if there are some that a copy could not be given for later steps.
        """
        exchanged = [n for n in vars(self._scheduler) if n not in OWN and callable(getattr(self._kind, n, None))]
        if exchanged:
            raise UnrecognisedError(
                f"the scheduler's {exchanged[0]} was exchanged on the object, so no copy has its own"
            )
        arguments: dict[str, Any] = dict(self._signature.bind(self._scheduler, *args, **kwargs).arguments)
        missing = [name for name in KNOWN if name not in arguments]
        more = [
            name
            for name, value in arguments.items()
            if name not in ("self", *KNOWN) and (isinstance(value, Tensor) or name not in self._optional())
        ]
        if missing or more:
            raise UnrecognisedError(
                f"{self._kind.__name__}.step takes {', '.join(more or missing)}, which cannot be drafted"
            )
        self._arguments = {name: value for name, value in arguments.items() if name not in ("self", *KNOWN)}
        return arguments

    def _optional(self) -> set[str]:
        return {n for n, p in self._signature.parameters.items() if p.default is not p.empty}

    def find(self, t: Any, index: int | None) -> int:
        """Return the index of a step's timestep, which is `index` if that is known."""
        if index is None:
            same = (self.timesteps == t).nonzero()
            if len(same) == 0:
                raise UnrecognisedError(f"timestep {t} is none of the scheduler's")
            return int(same[0])
        if index >= len(self.timesteps) or not bool(self.timesteps[index] == t):
            raise UnrecognisedError(f"timestep {t} does not follow the one before in the scheduler's order")
        return index

    def note(self, k: int, x: Tensor, output: Tensor) -> None:
        """Remember a step, for the drafts that look back on it."""
        self.taken[k] = Taken(x.clone(), output.clone())
        for old in [old for old in self.taken if old not in (self.anchor, self.base, k)]:
            del self.taken[old]

    def advance(self, base: int) -> None:
        """Let later drafts start from `base`, and look back on the base before."""
        if base > self.base:
            self.anchor, self.base = self.base, base

    def states(self, k: int, last: int, x: Tensor) -> Iterator[DraftState]:
        """Yield the state x at index k, which the pipeline is about to evaluate, and drafts for k + 1 to `last`."""
        ahead = copy_of(self._scheduler, OWN)
        arguments = copy_generators(self._arguments)
        drawn = torch.get_rng_state()
        try:
            for i in range(k, last + 1):
                t = self.timesteps[i]
                yield DraftState(i, x, scale_of(ahead, t))
                if i < last:
                    output = self._assume(k - 1, i, x)
                    stepped = ahead.step(model_output=output, timestep=t, sample=x, **arguments)
                    x = stepped[0].to(x.dtype)
        finally:
            torch.set_rng_state(drawn)  # A scheduler without a generator draws from the common one.

    def _assume(self, last: int, i: int, x: Tensor) -> Tensor:
        """Return the output that is assumed at index i, in state x, the last step taken being `last`."""
        taken = self.taken[last]
        if not self._levels.known or taken.output.shape != x.shape:
            return taken.output
        data = self._data(last)
        further, apart = i - last, last - self.anchor
        slope = self._rule.slope if self.anchor in self.taken and 0 < further <= apart else 0.0
        if slope:
            data = data + slope * further / apart * (data - self._data(self.anchor))
        at_state, at_output = self._levels.factors(i)
        return ((data - at_state * x.to(data.dtype)) / at_output).to(taken.output.dtype)

    def _data(self, k: int) -> Tensor:
        """Return the estimate of the data at a step that was taken."""
        at_state, at_output = self._levels.factors(k)
        taken = self.taken[k]
        working = torch.promote_types(taken.x.dtype, torch.float32)
        return at_state * taken.x.to(working) + at_output * taken.output.to(working)

    def shift(self, k: int, draft: Tensor, x: Tensor) -> Tensor | None:
        """Return what a prediction taken at `draft` changes by at x, for the rule's carry; None: nothing."""
        if not self._levels.known:
            return None
        carry = self._rule.carry_of(self._levels.prediction_type)
        if carry == 0 or torch.equal(draft, x):
            return None
        at_state, at_output = self._levels.factors(k)
        working = torch.promote_types(x.dtype, torch.float32)
        return (carry * at_state / at_output) * (draft.to(working) - x.to(working))

    @property
    def assumes(self) -> str:
        """What the rule comes to with this scheduler, if that is less than it says; else nothing."""
        if self._levels.known or self._rule == DraftRule(carry=0.0, slope=0.0):
            return ""
        return (
            f"{self._kind.__name__} clips its estimate of the data, or has noise levels that drp does not "
            "know: drafts assume that the model's output stays"
        )


def outputs_as_branches(tensors: Sequence[Tensor], like: Tensor) -> list[Tensor] | None:
    """Return views of a step's results, each of them an output like the latents; None if they are something else.

    A doubled batch is two such outputs, and so are two calls; channels beyond the latents' (a learned variance) are
    left out; a list of samples is one batch.
    """
    branches: list[Tensor] = []
    for tensor in tensors:
        if not tensor.is_floating_point() or tensor.numel() == 0:
            return None
        if tensor.dim() != like.dim() or tensor.shape[0] % len(like) or tensor.shape[2:] != like.shape[2:]:
            return None
        if tensor.dim() > 1 and tensor.shape[1] < like.shape[1]:
            return None
        for part in torch.split(tensor, len(like)):
            branches.append(part[:, : like.shape[1]] if tensor.dim() > 1 else part)
    return branches


def gain_of(branches: list[Tensor], output: Tensor) -> int:
    """Return 1 if a shift of all branches shifts the output after guidance as much, -1 the other way, 0 if unknown.

    Guidance is taken to be a weighted sum of the branches; the weights are fitted.
    """
    columns = torch.stack([branch.reshape(-1).double() for branch in branches], dim=1)
    wanted = output.reshape(-1).double()
    gram, right = columns.T @ columns, columns.T @ wanted
    weights = torch.linalg.pinv(gram, hermitian=True) @ right
    apart = float((columns @ weights - wanted).norm() / wanted.norm().clamp_min(1e-30))
    total = float(weights.sum())
    return (0 if abs(abs(total) - 1) > 0.01 else round(total)) if apart < 0.01 else 0
