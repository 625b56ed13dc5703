"""Learned: what one step of a pipeline showed: the program of its calls, and how each argument is to be expected."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from drp.diffusers.forms import OfState, OfTime, Scale, of_state, of_time
from drp.diffusers.program import Call, Leaf, Program, output_name, stride_of, with_zeros
from drp.diffusers.pytree import Json, UnknownValueError, flatten, rebuild
from drp.protocol.memory import NAMES
from drp.protocol.messages import MAX_TENSORS


class UnrecognisedError(Exception):
    """Why a pipeline's steps cannot be drafted; or what of a step is not as expected, and which argument it is."""

    def __init__(self, why: str, path: str = "") -> None:
        super().__init__(why)
        self.path = path


@dataclass
class RecordedCall:
    """A call that the pipeline made and that was answered in this process."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


@dataclass(frozen=True)
class Varying:
    """An argument that is another one at every step: `like` is that of the step that was learned from."""

    form: OfState | OfTime
    part: Tensor | None
    like: Tensor

    def at(self, x: Tensor, t: Tensor, scale: Scale) -> Tensor:
        """Return the argument for latents x at timestep t."""
        if isinstance(self.form, OfState):
            return self.form.apply(x, scale, self.like)
        return self.form.apply(t, self.like, self.part)


@dataclass
class Learned:
    """A step: `inputs` and `cond` by the names of the program's leaves; `results` describe what each call returned."""

    program: Program
    inputs: dict[str, Varying] = field(default_factory=dict)
    cond: dict[str, Tensor] = field(default_factory=dict)
    paths: list[list[str]] = field(default_factory=list)
    results: list[tuple[Json, list[Tensor]]] = field(default_factory=list)

    @property
    def outputs(self) -> dict[str, Tensor]:
        """Every tensor that the calls return, by its name in a slot."""
        return {
            output_name(number, place): tensor
            for number, (_, tensors) in enumerate(self.results)
            for place, tensor in enumerate(tensors)
        }

    def answer(self, call: int, outputs: Mapping[str, Tensor]) -> Any:
        """Return what a call returns, made of these tensors."""
        description, tensors = self.results[call]
        return rebuild(description, [outputs[output_name(call, place)] for place in range(len(tensors))])

    def tensors_of(self, number: int, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the tensors among the arguments of a call; raise UnrecognisedError if the others are not as before."""
        if number >= len(self.program.calls):
            raise UnrecognisedError(f"{module} was called once more")
        call = self.program.calls[number]
        if call.module != module:
            raise UnrecognisedError(f"{module} was called in the place of {call.module}")
        try:
            description, tensors, _ = flatten((list(args), kwargs))
        except UnknownValueError as error:
            raise UnrecognisedError(f"{module}: {error}") from None
        if description != call.arguments:
            raise UnrecognisedError(f"{module} has other arguments")
        return tensors

    def check(
        self,
        number: int,
        tensors: Sequence[Tensor],
        inputs: Mapping[str, Tensor],
        answered: Mapping[tuple[int, int], Tensor],
    ) -> None:
        """Raise UnrecognisedError unless every argument of a call is what the program will take it to be."""
        call = self.program.calls[number]
        for leaf, tensor, path in zip(call.leaves, tensors, self.paths[number], strict=True):
            if leaf.kind == "output":
                result = answered[leaf.call, leaf.place]
                same = tensor is result if leaf.zeros == 0 else _equal(tensor, with_zeros(result, leaf.zeros))
            else:
                same = _equal(tensor, (inputs if leaf.kind == "input" else self.cond)[leaf.name])
            if not same:
                raise UnrecognisedError(
                    f"{call.module}'s argument {path} is not what follows from the steps before", path
                )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))


def learn(
    recorded: Sequence[RecordedCall],
    x: Tensor,
    t: Tensor,
    scale: Scale,
    configs: Mapping[str, Mapping[str, Any]],
    suspects: Collection[str],
) -> Learned:
    """Return what the calls of one step show, the latents x and the timestep t being known.

    Of the arguments, those that are named so, those without a name and the `suspects` may follow from the timestep: a
    mask full of ones would else be taken for it now and then.

    Raises UnrecognisedError if there is something that a worker could not be asked to do for other latents.
    """
    learned = Learned(Program(()))
    results: dict[tuple[int, int], Tensor] = {}
    calls = []
    for number, record in enumerate(recorded):
        try:
            arguments, tensors, paths = flatten((list(record.args), record.kwargs))
            described, returned, _ = flatten(record.result)
        except UnknownValueError as error:
            raise UnrecognisedError(f"{record.module}: {error}") from None
        paths = [_plain(path) for path in paths]
        leaves = tuple(
            _of_result(tensor, results)
            or _leaf(learned, tensor, x, t, scale, configs[record.module], path in suspects or _of_time(path))
            for tensor, path in zip(tensors, paths, strict=True)
        )
        calls.append(Call(record.module, arguments, leaves, len(returned)))
        learned.paths.append(paths)
        learned.results.append((described, returned))
        results.update({(number, place): tensor for place, tensor in enumerate(returned)})
    learned.program = Program(tuple(calls))
    if not any(isinstance(varying.form, OfState) for varying in learned.inputs.values()):
        raise UnrecognisedError("no argument of the denoiser is made from the latents in a way that drp knows")
    most = max(len(learned.inputs), len(learned.outputs), len(learned.cond) + 1)
    if most > MAX_TENSORS:
        raise UnrecognisedError(f"a step takes or returns {most} tensors; drp passes {MAX_TENSORS}")
    for tensor in (*learned.cond.values(), *learned.outputs.values()):
        if tensor.dtype not in NAMES or tensor.device.type != "cpu":
            raise UnrecognisedError(f"there is a tensor of {tensor.dtype} on {tensor.device}, which drp does not pass")
    return learned


def _plain(path: str) -> str:
    """Return how a call's argument is called: by its name, or by its place."""
    _, dot, name = path.partition(".")
    return name if dot else f"number {path.removeprefix('[0]')}"


def _of_time(path: str) -> bool:
    return "time" in path or "sigma" in path or path.startswith("number")


def _of_result(tensor: Tensor, results: Mapping[tuple[int, int], Tensor]) -> Leaf | None:
    """Say where a tensor comes from that is a result of a call before, itself or with zeros for the unguided half."""
    for (number, place), result in results.items():
        if tensor is result:
            return Leaf("output", call=number, place=place)
        doubled = result.dim() > 0 and tensor.shape == (2 * len(result), *result.shape[1:])
        if doubled and torch.equal(tensor, with_zeros(result, len(result))):
            return Leaf("output", call=number, place=place, zeros=len(result))
    return None


def _leaf(
    learned: Learned,
    tensor: Tensor,
    x: Tensor,
    t: Tensor,
    scale: Scale,
    config: Mapping[str, Any],
    may_be_time: bool,
) -> Leaf:
    """Say where a tensor among the arguments comes from, and remember it there."""
    stride = stride_of(tensor)
    for name, varying in learned.inputs.items():
        if _equal(varying.like, tensor) and isinstance(varying.form, OfState):
            return Leaf("input", name, stride=stride)
    form: OfState | OfTime | None = of_state(tensor, x, scale)
    part = None
    if form is None and may_be_time and (timed := of_time(tensor, t, config)) is not None:
        form, part = timed
    if form is not None:
        name = f"input{len(learned.inputs)}"
        learned.inputs[name] = Varying(form, part, tensor)
        return Leaf("input", name, stride=stride)
    name = next((name for name, known in learned.cond.items() if known is tensor), f"cond{len(learned.cond)}")
    learned.cond[name] = tensor
    return Leaf("cond", name, stride=stride)
