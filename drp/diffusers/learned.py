"""The trace of one step of a pipeline: the program of its calls, and the expected arguments of later steps."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from drp.diffusers.forms import OfState, Point, of_state
from drp.diffusers.numbers import OfTime, alike, of_time
from drp.diffusers.program import Call, Leaf, Program, output_name, stride_of, with_zeros
from drp.diffusers.pytree import Json, UnknownValueError, flatten, rebuild
from drp.diffusers.structure import Described, copy_of, describe, equal_bits
from drp.models.state import random_states
from drp.protocol.memory import NAMES
from drp.protocol.messages import MAX_TENSORS

log = logging.getLogger(__name__)


class UnrecognisedError(Exception):
    """A step cannot be drafted, or differs from the traced one.

    final: the same is true of all later steps, so that tracing them is of no use.
    refuted: the names of the numbers from which the argument was wrongly derived.
    """

    def __init__(self, why: str, path: str = "", final: bool = False, refuted: Collection[str] = ()) -> None:
        super().__init__(why)
        self.path, self.final, self.refuted = path, final, refuted


@dataclass
class Tensors:
    """A description of the arguments or the results of a call, with copies of their tensors.

    The pipeline or the module may write to the tensors afterwards. `originals` are kept to compare identities.
    """

    description: Json
    originals: list[Tensor]
    paths: list[str]
    values: list[Tensor]

    @classmethod
    def of(cls, value: Any) -> Tensors:
        """Describe a value; raise UnknownValueError if it cannot be described."""
        description, tensors, paths = flatten(value)
        return cls(description, tensors, paths, [tensor.detach().clone() for tensor in tensors])

    @property
    def gpus(self) -> set[torch.device]:
        return {tensor.device for tensor in self.values if tensor.device.type == "cuda"}


@dataclass
class RecordedCall:
    """A recorded call, which was evaluated in this process.

    state, state_after: the module's state before and after the call, one object if the call has not changed it.
    settings: the settings of this process.
    random: the states of the random number generators before the call.
    has_drawn: whether they have changed during the call.
    given: the arguments themselves, to which the module may write.
    problem: why a worker cannot make the call, empty if it can.
    """

    module: str
    state: Described
    settings: Json
    arguments: Tensors | None = None
    results: Tensors | None = None
    state_after: Described | None = None
    random: Sequence[object] = ()
    has_drawn: bool = False
    given: Any = None
    problem: str = ""

    @property
    def gpus(self) -> set[torch.device]:
        """The GPUs of the arguments."""
        return set() if self.arguments is None else self.arguments.gpus

    @classmethod
    def before(
        cls, module: str, args: tuple[Any, ...], kwargs: dict[str, Any], state: Described, settings: Json
    ) -> RecordedCall:
        """Record a call before its evaluation, since the module may empty lists among its arguments."""
        try:
            given = list(args), kwargs
            arguments = Tensors.of(given)
        except UnknownValueError as error:
            return cls(module, state, settings, problem=f"{module}: {error}")
        return cls(module, state, settings, arguments, random=random_states(arguments.gpus), given=given)

    def after(self, result: Any, state: Described) -> None:
        """Record the results of the call, and the module's state after it."""
        self.state_after = state
        try:
            self.results = Tensors.of(result)
        except UnknownValueError as error:
            self.problem = self.problem or f"{self.module}'s result: {error}"
            return
        if any(tensor.requires_grad for tensor in self.results.originals):
            self.problem = self.problem or (
                f"gradients are recorded through {self.module}, which workers cannot do; if nothing takes them, call "
                "it under torch.no_grad()"
            )
        self.problem = self.problem or self._what_is_written()
        if self.arguments is not None:
            self.has_drawn = self.random != random_states(self.gpus)

    def _what_is_written(self) -> str:
        """Return what the call has written to its arguments, empty for nothing. Lists may have been emptied."""
        if self.arguments is None:
            return ""
        given, self.given = self.given, None
        for path, tensor, value in zip(
            self.arguments.paths, self.arguments.originals, self.arguments.values, strict=True
        ):
            if not equal_bits(tensor.detach(), value):
                return f"{self.module} writes to {_plain(path)}, which a worker does in its own memory"
        try:
            _, _, paths = flatten(given)
        except UnknownValueError as error:
            return f"{self.module}: {error}"
        if set(paths) - set(self.arguments.paths):
            return f"{self.module} adds to its arguments, which a worker does in its own memory"
        return ""

    def changes_again(self, varies: Sequence[bool], compiled: Any) -> bool:
        """Return whether the call has changed the module, and a call with other latents would change it again.

        Otherwise what has changed is a cache, for example. If it would, the module counts, or keeps something of its
        arguments. It is tried on a copy, which has the same weights. `varies` marks the tensors among the arguments
        that contain latents. Of modules that are `compiled`, nothing is known.
        """
        if self.state_after in (None, self.state) or self.arguments is None or compiled is not None:
            return False
        assert self.state_after is not None
        pairs = zip(self.arguments.values, varies, strict=True)
        tensors = [value * 0.5 if other else value.clone() for value, other in pairs]
        try:
            module = copy_of(self.state_after)
            before = describe(module)
            args, kwargs = rebuild(self.arguments.description, tensors)
            module(*args, **kwargs)
            return not before.same(describe(module))
        except Exception as error:  # whatever a module makes of being copied; workers will see
            log.debug("a copy of %s could not be evaluated: %s", self.module, error)
            return False
        finally:
            self.state_after.restore_namespaces()


@dataclass(frozen=True)
class Varying:
    """An argument that changes from step to step; `like` is its value in the traced step."""

    form: OfState | OfTime
    like: Tensor

    def at(self, point: Point) -> Tensor:
        if isinstance(self.form, OfState):
            return self.form.apply(point, self.like)
        return self.form.apply(point.numbers, self.like)


@dataclass
class Learned:
    """A traced step. `inputs` and `cond` are named as the program's leaves; `results` describe those of each call."""

    program: Program
    inputs: dict[str, Varying] = field(default_factory=dict)
    cond: dict[str, Tensor] = field(default_factory=dict)
    paths: list[list[str]] = field(default_factory=list)
    results: list[tuple[Json, list[Tensor]]] = field(default_factory=list)

    def has_latents(self, leaf: Leaf) -> bool:
        """Return whether an argument contains the latents, or follows from them by an earlier call."""
        return leaf.kind == "output" or (leaf.kind == "input" and isinstance(self.inputs[leaf.name].form, OfState))

    @property
    def outputs(self) -> dict[str, Tensor]:
        """All tensors that the calls return, by their names in a slot."""
        return {
            output_name(number, place): tensor
            for number, (_, tensors) in enumerate(self.results)
            for place, tensor in enumerate(tensors)
        }

    def answer(self, call: int, outputs: Mapping[str, Tensor]) -> Any:
        """Return the results of a call, built from these tensors."""
        description, tensors = self.results[call]
        return rebuild(description, [outputs[output_name(call, place)] for place in range(len(tensors))])

    def tensors_of(self, number: int, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return the tensors among the arguments of a call; raise UnrecognisedError if other arguments have changed."""
        if number >= len(self.program.calls):
            raise UnrecognisedError(f"{module} was called once more")
        call = self.program.calls[number]
        if call.module != module:
            raise UnrecognisedError(f"{module} was called in place of {call.module}")
        try:
            description, tensors, _ = flatten((list(args), kwargs))
        except UnknownValueError as error:
            raise UnrecognisedError(f"{module}: {error}") from None
        if description != call.arguments:
            raise UnrecognisedError(f"{module} has other arguments")
        return tensors

    def _expected(self, leaf: Leaf, inputs: Mapping[str, Tensor], answered: Mapping[tuple[int, int], Tensor]) -> Tensor:
        if leaf.kind == "output":
            return with_zeros(answered[leaf.call, leaf.place], leaf.zeros)
        return (self.cond if leaf.kind == "cond" else inputs)[leaf.name]

    def check(
        self,
        number: int,
        tensors: Sequence[Tensor],
        inputs: dict[str, Tensor],
        answered: Mapping[tuple[int, int], Tensor],
    ) -> None:
        """Raise UnrecognisedError unless every argument of a call has its expected value.

        The arguments of a step's first call may differ from the expected ones by rounding; `inputs` are set to them.
        """
        call = self.program.calls[number]
        expected = [self._expected(leaf, inputs, answered) for leaf in call.leaves]
        approximate = [leaf.kind == "input" and number == 0 for leaf in call.leaves]
        if number == 0:
            inputs.update((leaf.name, t) for leaf, t in zip(call.leaves, tensors, strict=True) if leaf.kind == "input")
        if all_equal(tensors, expected):
            return
        for leaf, tensor, wanted, rounded, path in zip(
            call.leaves, tensors, expected, approximate, self.paths[number], strict=True
        ):
            if not (alike(wanted, tensor) if rounded else _equal(tensor, wanted)):
                form = self.inputs[leaf.name].form if leaf.kind == "input" else None
                refuted = [part.name for part, _ in form.parts] if isinstance(form, OfTime) else ()
                raise UnrecognisedError(
                    f"{call.module}'s argument {path} is not what follows from the steps before", path, refuted=refuted
                )


def check_changes(learned: Learned, recorded: Sequence[RecordedCall], compiled: Mapping[str, Any]) -> None:
    """Raise UnrecognisedError if a module is changed by each of the recorded calls."""
    for record, call in zip(recorded, learned.program.calls, strict=True):
        if record.changes_again([*map(learned.has_latents, call.leaves)], compiled[record.module]):
            raise UnrecognisedError(
                f"{record.module} itself is changed by each evaluation: it counts, or keeps something of its "
                "arguments, which would stay in workers"
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))


def all_equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Return whether tensors are pairwise equal, with one synchronization of a GPU."""
    pairs = list(zip(a, b, strict=True))
    if any(x.shape != y.shape or x.dtype != y.dtype or x.device != y.device for x, y in pairs):
        return False
    on_host = [pair for pair in pairs if pair[0].device.type == "cpu"]
    others = [(x == y).all() for x, y in pairs if x.device.type != "cpu"]
    return all(torch.equal(x, y) for x, y in on_host) and (not others or bool(torch.stack(others).all()))


def learn(
    recorded: Sequence[RecordedCall],
    point: Point,
    configs: Mapping[str, Mapping[str, Any]],
    suspects: Mapping[str, Collection[str]],
) -> Learned:
    """Trace the recorded calls of one step, whose latents and numbers are known.

    Only arguments with suitable names, arguments without names and the `suspects` may follow from the timestep, since
    others, such as a mask of ones, may equal it by coincidence. `suspects` has the refuted numbers of each.

    Raises UnrecognisedError for calls that a worker cannot repeat with other latents.
    """
    learned = Learned(Program(()))
    results: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    kept: list[tuple[Tensor, str]] = []
    calls = []
    for number, record in enumerate(recorded):
        if record.problem or record.arguments is None or record.results is None:
            raise UnrecognisedError(record.problem or f"{record.module} did not return", final=True)
        paths = [_plain(path) for path in record.arguments.paths]
        leaves = tuple(
            _of_result(original, tensor, results)
            or _leaf(learned, kept, number, original, tensor, point, configs[record.module], path, suspects)
            for original, tensor, path in zip(record.arguments.originals, record.arguments.values, paths, strict=True)
        )
        returned = record.results
        calls.append(Call(record.module, record.arguments.description, leaves, returned.description))
        learned.paths.append(paths)
        learned.results.append((returned.description, returned.values))
        pairs = zip(returned.originals, returned.values, strict=True)
        results.update({(number, place): pair for place, pair in enumerate(pairs)})
    learned.program = Program(tuple(calls), settings=recorded[0].settings)
    if not any(isinstance(varying.form, OfState) for varying in learned.inputs.values()):
        raise UnrecognisedError("no argument of the denoiser is made from the latents in a way that drp knows")
    most = max(len(learned.inputs), len(learned.outputs), len(learned.cond) + 1)
    if most > MAX_TENSORS:
        raise UnrecognisedError(f"a step takes or returns {most} tensors; drp passes {MAX_TENSORS}")
    for tensor in (*learned.cond.values(), *learned.outputs.values()):
        if tensor.dtype not in NAMES or tensor.device.type not in ("cpu", point.x.device.type):
            raise UnrecognisedError(f"there is a tensor of {tensor.dtype} on {tensor.device}, which drp does not pass")
    return learned


def _plain(path: str) -> str:
    """Return the name of a call's argument, or its position."""
    _, dot, name = path.partition(".")
    return name if dot else f"number {path.removeprefix('[0]')}"


def _of_time(path: str) -> bool:
    return "time" in path or "sigma" in path or path.startswith("number")


def _of_result(
    original: Tensor, tensor: Tensor, results: Mapping[tuple[int, int], tuple[Tensor, Tensor]]
) -> Leaf | None:
    """Return the leaf of a tensor that is the result of an earlier call, perhaps with zeros for the unguided half."""
    for (number, place), (returned, result) in results.items():
        if original is returned and _equal(tensor, result):
            return Leaf("output", call=number, place=place)
        doubled = result.dim() > 0 and tensor.shape == (2 * len(result), *result.shape[1:])
        if doubled and _equal(tensor, with_zeros(result, len(result))):
            return Leaf("output", call=number, place=place, zeros=len(result))
    return None


def _leaf(
    learned: Learned,
    kept: list[tuple[Tensor, str]],
    number: int,
    original: Tensor,
    tensor: Tensor,
    point: Point,
    config: Mapping[str, Any],
    path: str,
    suspects: Mapping[str, Collection[str]],
) -> Leaf:
    """Return the leaf of a tensor among the arguments, and add it to the inputs or the conditions."""
    stride, on_host = stride_of(original), original.device.type == "cpu" != point.x.device.type
    may_be_time = path in suspects or _of_time(path)
    for name, varying in learned.inputs.items():
        if _equal(varying.like, tensor) and (may_be_time or isinstance(varying.form, OfState)):
            return Leaf("input", name, stride=stride, on_host=on_host)
    form: OfState | OfTime | None = of_state(tensor, point, config)
    if form is None and may_be_time:
        form = of_time(tensor, point.numbers, config, suspects.get(path, ()))
    if form is not None:
        varying = Varying(form, tensor)
        # Drafts know only the first call's arguments, so the arguments of other calls must follow bit-exactly.
        if number == 0 or _equal(varying.at(point), tensor):
            name = f"input{len(learned.inputs)}"
            learned.inputs[name] = varying
            return Leaf("input", name, stride=stride, on_host=on_host)
    same = (name for known, name in kept if known is original and _equal(learned.cond[name], tensor))
    name = next(same, f"cond{len(learned.cond)}")
    learned.cond[name] = tensor
    kept.append((original, name))
    return Leaf("cond", name, stride=stride, on_host=on_host)
