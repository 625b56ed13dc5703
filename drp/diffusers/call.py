"""Call: one call of a pipeline, from its first step to its last."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drp.diffusers.drafting import OWN, Drafter, scale_of
from drp.diffusers.evaluators import Evaluator
from drp.diffusers.forms import OfState
from drp.diffusers.learned import Learned, RecordedCall, UnrecognisedError, learn
from drp.diffusers.program import PART, Program
from drp.diffusers.pytree import Json, UnknownValueError, flatten
from drp.diffusers.report import CallReport
from drp.diffusers.rounds import Predictions
from drp.diffusers.scheduler import copy_of
from drp.sampling.modes import Mode

MAX_RETRACES = 6
"""How often in one call a step may turn out otherwise than those before it, and be learned from anew."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineContext:
    """What all calls of a pipeline have in common: `modules` by name, and for each what workers find it by.

    `split`: the branches of guidance are to be evaluated on different devices.
    """

    pipe: Any
    mode: Mode
    modules: Mapping[str, Callable[..., Any]]
    evaluator: Evaluator
    split: bool
    publish: Callable[[str], Json]
    unchanged: Callable[[str], bool]
    config_of: Callable[[str], Mapping[str, Any]]


@dataclass(frozen=True)
class TracedStep:
    """What a step showed, and the predictions for those that follow."""

    learned: Learned
    predictions: Predictions


class StepState:
    """A step that is under way: what was recorded of it, or how far it is answered."""

    def __init__(self) -> None:
        self.recorded: list[RecordedCall] = []
        self.position = 0
        """Calls answered."""
        self.mismatch = False
        """It has turned out not to be as the program says: the rest of it is evaluated here."""
        self.in_process = False
        """Something of it was evaluated here."""
        self.x: Tensor | None = None
        """The latents, as the denoiser's arguments show them."""
        self.exact = True
        """They are what the scheduler's last step returned."""
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.answered: dict[tuple[int, int], Tensor] = {}


class PipelineCall:
    """Answers the calls of the denoiser, in the order in which the pipeline makes them, and watches its scheduler.

    The first step is evaluated here, by the pipeline itself, and learned from. From then on the pipeline asks for what
    it has asked before, for other latents. When it asks for what nobody has predicted, the drafts of a round are made.
    """

    def __init__(self, work: PipelineContext, scheduler: Any, report: CallReport) -> None:
        self._context, self._scheduler, self._report = work, scheduler, report
        self._drafter = Drafter(scheduler, work.mode.rule)
        self._traced: TracedStep | None = None
        self._retraces = 0
        self._suspects: set[str] = set()
        self._step = StepState()
        self._index: int | None = None
        self._end: int | None = None
        self._stepped: Tensor | None = None
        self._began = time.perf_counter()

    # What the pipeline does.

    def evaluate(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the module returns: as predicted, at a draft or at these very arguments, or evaluated here."""
        if self._traced is not None and not self._step.mismatch:
            try:
                return self._answer(self._traced, module, args, kwargs)
            except UnrecognisedError as error:
                self._suspects.add(error.path)
                self._on_mismatch(str(error))
        return self._evaluate_in_process(module, args, kwargs)

    def step(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let the scheduler take a step, and learn from it."""
        if not self._report.sequential:
            try:
                self._before_step(args, kwargs)
            except UnrecognisedError as error:
                self._give_up(str(error))
        stepped = original(*args, **kwargs)
        self._stepped = stepped[0]
        if self._index is not None:
            self._index += 1
        self._report.steps += 1
        self._report.rounds += self._step.in_process
        self._report.seconds = time.perf_counter() - self._began
        self._step = StepState()
        return stepped

    def close(self) -> None:
        lesson, self._traced = self._traced, None
        if lesson is not None:
            lesson.predictions.close()

    # A step.

    def _evaluate_in_process(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate in this process, as the pipeline would have done."""
        began = time.perf_counter()
        result = self._context.modules[module](*args, **kwargs)
        self._report.device_seconds += time.perf_counter() - began
        self._report.evaluations += not self._step.in_process
        self._step.in_process = True
        if not self._report.sequential:
            self._step.recorded.append(RecordedCall(module, args, kwargs, result))
        return result

    def _before_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check the step that ends, or learn from it."""
        arguments = self._drafter.read(args, kwargs)
        x, output = arguments["sample"], arguments["model_output"]
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            raise UnrecognisedError("the scheduler's step takes no tensors")
        k = self._index = self._drafter.find(arguments["timestep"], self._index)
        step = self._step
        if self._traced is not None and not step.mismatch:
            calls = self._traced.learned.program.calls
            if step.position < len(calls):
                self._on_mismatch(f"{calls[step.position].module} was not called")
            elif step.x is None or not _agree(step.x, x, step.exact):
                self._on_mismatch("the scheduler was given other latents than the denoiser")
        if self._traced is None and step.recorded:
            self._learn(k, x, output)
        elif step.mismatch:
            self._forget()
        self._drafter.note(k, x, output)

    def _on_mismatch(self, why: str) -> None:
        """Take the rest of this step without the program."""
        self._report.notes[f"a step was evaluated anew: {why}"] += 1
        self._retraces += 1
        if self._step.position == 0:  # Nothing of it was answered yet: it can be learned from.
            self._forget()
        else:
            self._step.mismatch = True
            self._retraces += 2  # It costs more: what was answered of the step has been evaluated for nothing.
        if self._retraces >= MAX_RETRACES:
            self._give_up(f"steps differ from one another: {why}")

    def _forget(self) -> None:
        self.close()
        self._step.mismatch = False

    def _give_up(self, why: str) -> None:
        """Take the remaining steps without drafts."""
        self._forget()
        self._report.sequential = why

    def _learn(self, k: int, x: Tensor, output: Tensor) -> None:
        """Make a program of the step whose calls were recorded, and begin rounds with it."""
        work, t = self._context, self._drafter.timesteps[k]
        if torch.is_autocast_enabled("cpu"):
            raise UnrecognisedError("the pipeline runs under torch.autocast, which workers do not")
        if torch.get_default_dtype() != torch.float32:
            raise UnrecognisedError(f"torch's default dtype is {torch.get_default_dtype()}; workers have float32")
        recorded = self._step.recorded
        configs = {record.module: work.config_of(record.module) for record in recorded}
        learned = learn(recorded, x, t, scale_of(copy_of(self._scheduler, OWN), t), configs, self._suspects)
        try:
            sources = {name: work.publish(name) for name in configs}
        except UnknownValueError as error:
            raise UnrecognisedError(str(error)) from None
        if self._end is None:
            left = len(self._drafter.timesteps) - k
            said = getattr(work.pipe, "_num_timesteps", None)  # fewer, if it stops before the last
            self._end = k + (said if isinstance(said, int) and 0 < said < left else left)
        elif k >= self._end:  # It said too few.
            self._end = len(self._drafter.timesteps)
        self._drafter.taken.clear()
        predictions = self._split(learned, sources, k) if work.split else None
        if predictions is None:
            predictions = self._bind(learned, learned.program, sources, k)
        predictions.fit_guidance(x, output)
        self._traced = TracedStep(learned, predictions)
        if self._drafter.assumes:
            self._report.notes[self._drafter.assumes] = 1

    def _bind(self, learned: Learned, program: Program, sources: Mapping[str, Json], k: int) -> Predictions:
        """Begin rounds with a program."""
        assert self._end is not None
        work = self._context
        inputs = {name: varying.like for name, varying in learned.inputs.items()}
        if program.parts > 1:
            inputs[PART] = torch.tensor(0)
        slots = work.mode.width * program.parts
        session = work.evaluator.bind(program, sources, inputs, learned.outputs, slots, learned.cond)
        return Predictions(learned, self._drafter, session, work.mode, k, self._end, self._report, program)

    def _split(self, learned: Learned, sources: Mapping[str, Json], k: int) -> Predictions | None:
        """Begin rounds with the branches of guidance apart, if that makes what the step has made; else say why not."""
        doubled = [v for v in learned.inputs.values() if isinstance(v.form, OfState)]
        sizes = {len(v.like) if isinstance(v.form, OfState) and v.form.repeats == 2 else 0 for v in doubled}
        program = learned.program.in_branches(sizes - {0} if 0 not in sizes else ())
        if program is None:
            self._report.notes["guidance was not split: a step has no two branches that drp knows"] = 1
            return None
        predictions = self._bind(learned, program, sources, k)
        try:
            if not program.batch or predictions.agrees():
                return predictions
        except Exception as error:  # whatever a module makes of half a batch; what is lost is missed again at once
            log.debug("the halves of a batch could not be evaluated: %s", error)
        predictions.close()
        self._report.notes["guidance was not split: the halves of the batch depend on each other"] = 1
        return None

    # Answering.

    def _answer(self, lesson: TracedStep, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what was predicted for a call; raise UnrecognisedError if it is not one that was expected."""
        learned, step = lesson.learned, self._step
        number, k = step.position, self._index
        tensors = learned.tensors_of(number, module, args, kwargs)
        if k is None or self._end is None or k >= self._end or self._stepped is None:
            raise UnrecognisedError("the pipeline takes more steps than its scheduler has timesteps")
        if step.x is None:
            step.x = self._expect(learned, tensors, k, self._stepped)
        learned.check(number, tensors, step.inputs, step.answered)
        if number == 0:
            for name in {call.module for call in learned.program.calls}:
                if not self._context.unchanged(name):
                    raise UnrecognisedError(f"{name} itself was changed")
            stepped = None if step.exact else self._stepped
            step.outputs = lesson.predictions.at(k, step.x, step.inputs, stepped)
        step.position += 1
        result = learned.answer(number, step.outputs)
        step.answered.update({(number, place): tensor for place, tensor in enumerate(flatten(result)[1])})
        return result

    def _expect(self, learned: Learned, tensors: list[Tensor], k: int, stepped: Tensor) -> Tensor:
        """Return the latents that the denoiser is given; find the arguments that follow from them."""
        step, t = self._step, self._drafter.timesteps[k]
        scale = scale_of(copy_of(self._scheduler, OWN), t)
        x = stepped
        leaves = learned.program.calls[0].leaves
        for leaf, tensor in zip(leaves, tensors, strict=True):
            varying = learned.inputs[leaf.name] if leaf.kind == "input" else None
            if varying is None or not isinstance(varying.form, OfState) or varying.form.item is not None:
                continue
            if tensor.shape != varying.like.shape or tensor.dtype != varying.like.dtype:
                raise UnrecognisedError("the denoiser is given latents of another shape")
            if not torch.equal(varying.form.apply(x, scale, varying.like), tensor):
                # The pipeline, or a callback, changed the latents after the scheduler's step.
                step.exact = False
                x = varying.form.read(tensor, x, scale)
                if not varying.form.same_elsewhere(varying.like, tensor, x):
                    raise UnrecognisedError("what is added to the latents has changed")
                step.inputs[leaf.name] = tensor
            break
        for name, varying in learned.inputs.items():
            if name not in step.inputs:
                step.inputs[name] = varying.at(x, t, scale)
        return x


def _agree(read: Tensor, x: Tensor, exact: bool) -> bool:
    """Return whether the latents are those that were read from the denoiser's arguments, exactly or to rounding."""
    if exact or read.shape != x.shape:
        return torch.equal(read, x)
    return float((read.double() - x.double()).norm()) <= 0.02 * float(x.double().norm())
