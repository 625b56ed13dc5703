"""Drafts of a pipeline's call: a copy of the scheduler is stepped with the outputs that a draft rule extrapolates."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drp.diffusers.arguments import Argument, argument_of, results_of
from drp.diffusers.forms import Scale
from drp.diffusers.learned import UnrecognisedError
from drp.diffusers.scheduler import SchedulerLevels, adds_noise, copy_of, why_drafts_differ
from drp.diffusers.watch import METHODS, replaced_method
from drp.sampling.drafts import PAPER, DraftRule

KNOWN = ("model_output", "timestep", "sample")


def scale_of(scheduler: Any, t: Tensor) -> Scale:
    """Return the scheduler's `scale_model_input` at its current step. It may change `scheduler`."""
    if not hasattr(scheduler, "scale_model_input"):
        return lambda x: x
    return lambda x: scheduler.scale_model_input(x, t)


@dataclass(frozen=True)
class StepRecord:
    """A step that was taken: the latents before it, and the model output after guidance."""

    x: Tensor
    output: Tensor


Kept = Callable[[int, Tensor], "Tensor | None"]
"""(index, state) -> the output after guidance in that state by the prediction at the index, None without one."""


@dataclass(frozen=True)
class DraftState:
    """A draft at an index: the state, and the scheduler's scaling there."""

    index: int
    x: Tensor
    scale: Scale


class Drafter:
    """Makes the drafts of one call. Indices refer to the scheduler's timesteps."""

    def __init__(self, scheduler: Any) -> None:
        self._on_device: Tensor = scheduler.timesteps
        self.timesteps = self._on_device.cpu()
        """The timesteps on the host, where reading them does not wait for a GPU."""
        self._sigmas: tuple[Any, Any] = (None, None)
        """The scheduler's noise levels, and the same on the host."""
        self._scheduler = scheduler
        self.rule: DraftRule = PAPER
        """The rule of the mode, which is known once the number of steps is."""
        self._kind = type(scheduler)
        self._signature = inspect.signature(self._kind.step)
        self._levels = SchedulerLevels(scheduler, self.timesteps)
        self.adds_noise = adds_noise(scheduler)
        self._arguments: dict[str, Argument] = {}
        self._time: Any = None
        self.stepped: Sequence[Any] = ()
        """The results of the scheduler's last step."""
        self.taken: dict[int, StepRecord] = {}
        self.base = 0
        self.previous_base = 0

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the scheduler's `step` by name; raise UnrecognisedError if they can't be drafted."""
        if (name := replaced_method(self._scheduler)) is not None:
            raise UnrecognisedError(f"the scheduler's {name} was replaced on the object, so no copy has its own")
        arguments: dict[str, Any] = dict(self._signature.bind(self._scheduler, *args, **kwargs).arguments)
        missing = [name for name in KNOWN if name not in arguments]
        if missing:
            raise UnrecognisedError(
                f"{self._kind.__name__}.step takes {', '.join(missing)}, which cannot be drafted", final=True
            )
        return arguments

    def follow(self, k: int, arguments: Mapping[str, Any]) -> None:
        """Find the forms of a step's arguments at later indices; raise UnrecognisedError if one is unknown."""
        self._time = arguments["timestep"]
        self._arguments = {}
        for name, value in arguments.items():
            if name not in ("self", *KNOWN):
                argument = argument_of(name, value, self.numbers(k), self.stepped)
                if argument is None:
                    kind = self._kind.__name__
                    raise UnrecognisedError(f"{kind}.step takes {name}, which cannot be drafted", final=True)
                self._arguments[name] = argument

    def find(self, t: Any, index: int | None) -> int:
        """Return the index of a step's timestep; `index` is the expected one, if it is known."""
        if isinstance(t, Tensor) and t.dim() > 0:  # one per sample or token
            if t.numel() == 0 or not bool((t == t.flatten()[0]).all()):
                raise UnrecognisedError("the scheduler's step is given several timesteps at once", final=True)
            t = t.flatten()[0]
        if index is None:
            return self._first(t)
        if index >= len(self.timesteps) or not (self._is_view(t, index) or bool(self.timesteps[index] == t)):
            raise UnrecognisedError(f"timestep {t} does not follow the one before in the scheduler's order")
        return index

    def _is_view(self, t: Any, index: int) -> bool:
        """Return whether a tensor on a GPU is the scheduler's timestep at an index, without waiting for its value."""
        if not isinstance(t, Tensor) or t.device.type == "cpu" or t.dtype != self._on_device.dtype:
            return False
        return t.data_ptr() == self._on_device[index].data_ptr()

    def _first(self, t: Any) -> int:
        """Return the index of the first step's timestep; second-order schedulers have each timestep twice."""
        same: list[int] = (self.timesteps == (t.cpu() if isinstance(t, Tensor) else t)).nonzero().flatten().tolist()
        if not same:
            raise UnrecognisedError(f"timestep {t} is not one of the scheduler's")
        if len(same) > 1 and hasattr(self._scheduler, "_init_step_index"):
            asked = copy_of(self._scheduler, METHODS)
            asked._init_step_index(t)
            same.insert(0, asked.step_index)
        elif len(same) > 1 and isinstance(t, Tensor) and t.dtype == self.timesteps.dtype:
            # Pipelines iterate over a slice of the timesteps, and pass views of them.
            apart = t.data_ptr() - self._on_device.data_ptr()
            same.insert(0, apart // (t.element_size() * self._on_device.stride(0)))
        return next(k for k in same if 0 <= k < len(self.timesteps) and bool(self.timesteps[k] == t))

    def numbers(self, k: int) -> dict[str, Tensor]:
        """Return the numbers of a step: the timestep and the noise level at index k, and the next ones."""
        numbers = {"t": self.timesteps[k]}
        numbers["next t"] = self.timesteps[k + 1] if k + 1 < len(self.timesteps) else torch.zeros_like(numbers["t"])
        if k > 0:
            numbers["last t"] = self.timesteps[k - 1]
        sigmas = getattr(self._scheduler, "sigmas", None)
        if isinstance(sigmas, Tensor) and sigmas.dim() == 1 and len(self.timesteps) <= len(sigmas):
            if sigmas is not self._sigmas[0]:
                self._sigmas = sigmas, sigmas.cpu()
            numbers["sigma"] = self._sigmas[1][k]
            if k + 1 < len(sigmas):
                numbers["next sigma"] = self._sigmas[1][k + 1]
        return numbers

    def why_not(self, k: int, x: Tensor, output: Tensor) -> str:
        """Return why drafted samples would not converge to sequential ones with shorter steps, empty if they do."""
        self._levels.clips(k, x, output)
        if self._levels.jumps:
            name = self._kind.__name__
            return f"{name} clips the estimate of the data, whose jumps do not become smaller with shorter steps"
        return why_drafts_differ(self._scheduler)

    def note(self, k: int, x: Tensor, output: Tensor) -> None:
        """Record a step, for drafts that depend on previous steps."""
        self.taken[k] = StepRecord(x.clone(), output.clone())
        for old in [old for old in self.taken if old not in (self.previous_base, self.base, k)]:
            del self.taken[old]

    def advance(self, base: int) -> None:
        """Start later drafts from `base`, and extrapolate from the previous base."""
        if base > self.base:
            self.previous_base, self.base = self.base, base

    def states(self, k: int, last: int, x: Tensor, kept: Kept) -> Iterator[DraftState]:
        """Yield the state x at index k, which the pipeline is about to evaluate, and drafts for k + 1 to `last`.

        Drafts are refined with the predictions that there are, and extrapolated by the rule beyond them.
        """
        newest, known = k - 1, self.taken[k - 1]
        estimates: dict[int, Tensor] = {}
        ahead = copy_of(self._scheduler, METHODS)
        arguments = {name: argument.copied() for name, argument in self._arguments.items()}
        stepped: Sequence[Any] = self.stepped
        drawn = torch.get_rng_state()
        drawn_there = torch.cuda.get_rng_state(x.device) if x.device.type == "cuda" else None
        try:
            for i in range(k, last + 1):
                t = self.timesteps[i]
                yield DraftState(i, x, scale_of(ahead, t))
                if i < last:
                    numbers = self.numbers(i)
                    given = {name: argument.at(numbers, stepped) for name, argument in arguments.items()}
                    several = isinstance(self._time, Tensor) and self._time.dim() > 0  # one per sample or token
                    time = self._on_device[i].expand(self._time.shape) if several else t
                    output = kept(i, x)
                    if output is None:
                        output = self._extrapolate(newest, known, i, x, estimates)
                    else:
                        newest, known = i, StepRecord(x, output)
                        estimates.clear()
                    stepped = results_of(ahead.step(model_output=output, timestep=time, sample=x, **given))
                    x = stepped[0].to(x.dtype)
        finally:
            torch.set_rng_state(drawn)  # A scheduler without a generator uses torch's default one.
            if drawn_there is not None:
                torch.cuda.set_rng_state(drawn_there, x.device)

    def _extrapolate(self, last: int, known: StepRecord, i: int, x: Tensor, estimates: dict[int, Tensor]) -> Tensor:
        """Return the extrapolated output at index i in state x; `last` is the last index with a prediction.

        `estimates` caches the data estimates by index for other drafts with the same `known`.
        """
        if not self._levels.known or known.output.shape != x.shape:
            return known.output
        base = self.previous_base if self.previous_base in self.taken else last
        weights = self.rule.extrapolate(i, base, last, self._levels.of_run)
        for k in weights.keys() - estimates.keys():
            estimates[k] = self._data(k, known if k == last else self.taken[k])
        data = functools.reduce(operator.add, (weight * estimates[k] for k, weight in weights.items()))
        at_state, at_output = self._levels.factors(i)
        return ((data - at_state * x.to(data.dtype)) / at_output).to(known.output.dtype)

    def _data(self, k: int, taken: StepRecord) -> Tensor:
        """Return the estimate of the data at index k."""
        at_state, at_output = self._levels.factors(k)
        working = torch.promote_types(taken.x.dtype, torch.float32)
        return at_state * taken.x.to(working) + at_output * taken.output.to(working)

    def shift(self, k: int, draft: Tensor, x: Tensor) -> Tensor | None:
        """Return the change of a prediction from `draft` to x by the rule's carry, None for no change."""
        if not self._levels.known:
            return None
        carry = self.rule.carry_at(k, self._levels.of_run)
        if carry == 0 or torch.equal(draft, x):
            return None
        at_state, at_output = self._levels.factors(k)
        working = torch.promote_types(x.dtype, torch.float32)
        shift: Tensor = (carry * at_state / at_output) * (draft.to(working) - x.to(working))
        return shift

    @property
    def assumes(self) -> str:
        """The restriction of the rule with this scheduler, empty for none."""
        if self._levels.known or self.rule == PAPER:
            return ""
        return (
            f"{self._kind.__name__} clips its estimate of the data, or has noise levels that drp does not "
            "know: drafts assume that the model's output stays"
        )


def outputs_as_branches(tensors: Sequence[Tensor], like: Tensor) -> list[Tensor] | None:
    """Return views of a step's results, one for each branch of guidance, like the latents; None for other results.

    A doubled batch has two branches, as have two calls. Further channels (a learned variance) are left out, and a list
    of samples is one batch.
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


def weights_of(branches: list[Tensor], output: Tensor) -> list[float] | None:
    """Return the weights of the branches whose weighted sum is the output after guidance, None if there are none."""
    columns = torch.stack([branch.reshape(-1).double() for branch in branches], dim=1)
    wanted = output.reshape(-1).double()
    gram, right = columns.T @ columns, columns.T @ wanted
    weights = torch.linalg.pinv(gram, hermitian=True) @ right
    apart = float((columns @ weights - wanted).norm() / wanted.norm().clamp_min(1e-30))
    return weights.tolist() if apart < 0.01 else None


def gain_of(weights: list[float] | None) -> int:
    """Return by how much the output after guidance shifts with all branches: 1, -1 if reversed, 0 if unknown."""
    total = sum(weights or [0.0])
    return 0 if abs(abs(total) - 1) > 0.01 else round(total)
