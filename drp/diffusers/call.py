"""One call of a pipeline, from its first step to its last."""

from __future__ import annotations

import logging
import os
import time
import traceback
from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor

from drp.diffusers.arguments import results_of
from drp.diffusers.context import PipelineContext
from drp.diffusers.drafting import Drafter, scale_of
from drp.diffusers.forms import OfState, Point
from drp.diffusers.learned import Learned, RecordedCall, UnrecognisedError, check_changes, learn
from drp.diffusers.numbers import alike
from drp.diffusers.program import PART, PROGRAM, Program, to_tensor
from drp.diffusers.pytree import Json, UnknownValueError, flatten
from drp.diffusers.report import CallReport
from drp.diffusers.rounds import Predictions
from drp.diffusers.scheduler import adds_noise, copy_of
from drp.diffusers.settings import read_settings
from drp.diffusers.step_state import StepState, TracedStep
from drp.diffusers.structure import Described
from drp.diffusers.watch import METHODS

MAX_RETRACES = 8
"""How often a call may trace a step again because it differs from the previous ones. A step that differs after some of
its calls were answered counts three times, as where guidance begins and where it ends."""
MOST_CALLS = 256
"""How many denoiser calls are recorded until the scheduler takes a step."""

log = logging.getLogger(__name__)


class PipelineCall:
    """Answers the denoiser calls of a pipeline, in their order, and watches its scheduler.

    The first step is evaluated in this process and traced. Later steps make the same calls with other latents. When a
    call has no prediction yet, the drafts of the next round are made and evaluated.
    """

    def __init__(self, work: PipelineContext, scheduler: Any, report: CallReport) -> None:
        self._context, self._report = work, report
        self._traced: TracedStep | None = None
        self._retraces = 0
        self._suspects: dict[str, set[str]] = {}
        self._drew = False
        self._step = StepState()
        self._index: int | None = None
        self._end: int | None = None
        self._stepped: Tensor | None = None
        self._began = time.perf_counter()
        self._steps_with(scheduler)

    def _steps_with(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        try:
            self._mode = self._context.modes[adds_noise(scheduler)]
            self._drafter = Drafter(scheduler)
        except Exception as error:  # an unknown kind of scheduler
            self._fail(error)

    # Called by the pipeline.

    def evaluate(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the module's result: a prediction at a draft or these arguments, or an evaluation in this process."""
        if self._traced is not None and not self._step.mismatch:
            try:
                return self._answer(self._traced, module, args, kwargs)
            except UnrecognisedError as error:
                self._suspects.setdefault(error.path, set()).update(error.refuted)
                self._on_mismatch(error)
            except UnknownValueError as error:  # A module was changed to something that workers cannot have.
                self._give_up(str(error))
            except Exception as error:  # The call continues, as it would without drp.
                self._fail(error)
        return self._evaluate_in_process(module, args, kwargs)

    def belongs(self, scheduler: Any) -> bool:
        """Return whether this scheduler is the one of this call: the one whose step follows the first evaluation.

        A pipeline may step further kinds of latents with another scheduler.
        """
        if scheduler is not self.scheduler and self._report.steps == 0 and self._step.recorded:
            self._steps_with(scheduler)
        return scheduler is self.scheduler

    @property
    def goes_on(self) -> bool:
        return self._index is None or self._end is None or self._index < self._end

    def step(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not self._report.sequential:
            try:
                self._before_step(args, kwargs)
            except UnrecognisedError as error:
                self._give_up(str(error))
            except Exception as error:  # as above
                self._fail(error)
        stepped = original(*args, **kwargs)
        if not self._report.sequential:
            try:
                self._drafter.stepped = results_of(stepped)
                self._stepped = self._drafter.stepped[0]
            except Exception as error:  # as above
                self._fail(error)
        if self._index is not None:
            self._index += 1
        # A pipeline may call its scheduler several times for one evaluation.
        self._report.steps += self._step.in_process or self._step.position > 0
        self._report.rounds += self._step.in_process
        self._report.seconds = time.perf_counter() - self._began
        self._step = StepState()
        return stepped

    def close(self) -> None:
        traced, self._traced = self._traced, None
        if traced is not None:
            traced.predictions.close()

    # A step.

    def _evaluate_in_process(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate in this process, as the pipeline does without drp."""
        recorded = None if self._report.sequential else self._record(module, args, kwargs)
        # Of a recorded call the results are read next; others are not waited for, as without drp.
        result, seconds = self._context.evaluate(module, args, kwargs, recorded.gpus if recorded is not None else ())
        self._report.device_seconds += seconds
        self._report.evaluations += not self._step.in_process
        self._step.in_process = True
        if recorded is not None:
            try:
                recorded.after(result, self._context.describe(module))
            except Exception as error:  # as above
                self._fail(error)
        return result

    def _record(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedCall | None:
        """Begin recording a call that is about to be evaluated in this process."""
        if len(self._step.recorded) >= MOST_CALLS:
            self._give_up(f"the denoiser was called {MOST_CALLS} times without a step of the scheduler")
            return None
        try:
            recorded = RecordedCall.before(module, args, kwargs, self._context.describe(module), read_settings())
        except ValueError as error:
            self._give_up(str(error))
            return None
        except Exception as error:  # The call continues, as it would without drp.
            self._fail(error)
            return None
        self._step.recorded.append(recorded)
        return recorded

    def _before_step(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Check the step that has ended, or trace it."""
        arguments = self._drafter.read(args, kwargs)
        x, output = arguments["sample"], arguments["model_output"]
        if not isinstance(x, Tensor) or not isinstance(output, Tensor):
            raise UnrecognisedError("the scheduler's step takes no tensors")
        k = self._index = self._drafter.find(arguments["timestep"], self._index)
        self._drafter.follow(k, arguments)
        step = self._step
        if self._traced is not None and not step.mismatch:
            calls = self._traced.learned.program.calls
            if step.position < len(calls):
                self._on_mismatch(UnrecognisedError(f"{calls[step.position].module} was not called"))
            elif step.x is None or not _agree(step.x, x, step.exact):
                self._on_mismatch(UnrecognisedError("the scheduler was given other latents than the denoiser"))
        why_not = self._drafter.why_not(k, x, output) if self._mode.width > 1 else ""
        if why_not and not self._context.always_draft:
            raise UnrecognisedError(f"{why_not}; always_draft=True drafts nevertheless")
        if self._traced is None and step.recorded and not self._has_drawn():
            self._learn(k, x, output)
        elif step.mismatch:
            self._forget()
        self._drafter.note(k, x, output)

    def _on_mismatch(self, error: UnrecognisedError) -> None:
        """Evaluate the rest of this step in this process."""
        why = str(error)
        self._report.notes[f"a step was evaluated without drafts: {why}"] += 1
        self._retraces += 1
        if self._step.position == 0:  # No call of it was answered yet, so it can be traced.
            self._forget()
        else:
            self._step.mismatch = True
            self._retraces += 2  # The evaluations that were answered are wasted.
        if error.final:
            self._give_up(why)
        elif self._retraces >= MAX_RETRACES:
            self._give_up(f"steps differ from one another: {why}")

    def _forget(self) -> None:
        try:
            self.close()
        except Exception:  # for the call that failed
            log.debug("a session could not be closed:\n%s", traceback.format_exc())
        self._step.mismatch = False

    def _give_up(self, why: str) -> None:
        """Take the remaining steps without drafts."""
        self._forget()
        self._step.recorded.clear()
        self._report.sequential = why

    def _fail(self, error: Exception) -> None:
        """Take the remaining steps without drafts because drafting itself has failed."""
        # As text: a handler may keep the record, and with the exception the frames that hold the pipeline's memory.
        log.warning("drafting failed; the call goes on without:\n%s", "".join(traceback.format_exception(error)))
        self._give_up(f"drafting failed: {type(error).__name__}: {error}")

    def _has_drawn(self) -> bool:
        """Return whether random numbers were drawn in the step; raise UnrecognisedError if they were before, too."""
        drawing = next((record.module for record in self._step.recorded if record.has_drawn), "")
        if drawing and self._drew:  # Once, it may have been another thread.
            raise UnrecognisedError(
                f"{drawing} draws random numbers, and workers would draw different ones; in training mode it may be "
                f"dropout, which {drawing}.eval() turns off; it may also be another thread of this program"
            )
        self._drew |= bool(drawing)
        return bool(drawing)

    def _learn(self, k: int, x: Tensor, output: Tensor) -> None:
        """Make a program of the recorded step, and begin rounds with it."""
        work = self._context
        if not (bool(x.isfinite().all()) and bool(output.isfinite().all())):
            raise UnrecognisedError("the latents or the denoiser's output are not finite")
        recorded = self._step.recorded
        states: dict[str, Described] = {}
        for record in recorded:
            if states.get(record.module, record.state) is not record.state or record.state_after is None:
                raise UnrecognisedError(f"{record.module} itself is changed between two calls of one step")
            if record.settings != recorded[0].settings:
                raise UnrecognisedError("torch's settings, or the choice of attention kernels, change within one step")
            states[record.module] = record.state_after
        configs = {record.module: work.config_of(record.module) for record in recorded}
        learned = learn(recorded, self._point(k, x), configs, self._suspects)
        check_changes(learned, recorded, {name: work.modules[name].compiled for name in states})
        try:
            sources = {name: work.publish(name, state) for name, state in states.items()}
        except UnknownValueError as error:
            raise UnrecognisedError(str(error)) from None
        if self._end is None:
            left = len(self._drafter.timesteps) - k
            said = getattr(work.pipe, "_num_timesteps", None)  # or fewer, if it stops early
            self._end = k + (said if isinstance(said, int) and 0 < said < left else left)
        elif k >= self._end:  # There are more steps than announced.
            self._end = len(self._drafter.timesteps)
        self._drafter.taken.clear()
        predictions = self._split(learned, sources, k) if work.split else None
        if predictions is None and work.evaluator.drafts_per_device > 1:
            predictions = self._stack(learned, sources, k)
        if predictions is None:
            predictions = self._bind(learned, learned.program, sources, k)
        self._traced = TracedStep(learned, predictions)  # From here on, `_forget` closes the predictions.
        if any(sources.values()):
            self._verify(predictions)
        predictions.fit_guidance(x, output)
        if self._drafter.assumes:
            self._report.notes[self._drafter.assumes] = 1

    def _bind(self, learned: Learned, program: Program, sources: Mapping[str, Json], k: int) -> Predictions:
        assert self._end is not None
        work = self._context
        inputs = {name: varying.like for name, varying in learned.inputs.items()}
        if program.parts > 1:
            inputs[PART] = torch.tensor(0)
        encoded = to_tensor(program, sources)
        cond = {**learned.cond, PROGRAM: encoded}
        session = work.evaluator.bind(inputs, learned.outputs, self._slots(program), cond)
        key = hash(encoded.numpy().tobytes())
        try:
            return Predictions(learned, self._drafter, session, self._mode, k, self._end, self._report, program, key)
        except BaseException:  # for example, the mode cannot take this number of steps
            session.close()
            raise

    def _slots(self, program: Program) -> int:
        """Return the number of slots: those of a round, and no fewer than all devices evaluate at once."""
        evaluator = self._context.evaluator
        drafts = max(self._mode.width, ceil(len(evaluator.devices) * evaluator.drafts_per_device / program.parts))
        return drafts * program.parts

    def _verify(self, predictions: Predictions) -> None:
        """Raise UnrecognisedError unless every device reproduces the traced step, once per program and environment."""
        verified, key = self._context.evaluator.verified, hash((predictions.key, frozenset(os.environ.items())))
        if key not in verified and not predictions.agrees(on_all=True):
            raise UnrecognisedError(
                "workers have other results than this process: a module depends on what they lack, such as a function "
                "that was replaced in a library, a variable that is not a number, or the environment"
            )
        verified.add(key)

    def _split(self, learned: Learned, sources: Mapping[str, Json], k: int) -> Predictions | None:
        """Begin rounds with split guidance, if that reproduces the traced step; else note the reason."""
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
        except Exception as error:  # A module may fail for half a batch. A lost worker is noticed again immediately.
            log.debug("the halves of a batch could not be evaluated: %s", error)
        predictions.close()
        self._report.notes["guidance was not split: the halves of the batch depend on each other"] = 1
        return None

    def _stack(self, learned: Learned, sources: Mapping[str, Json], k: int) -> Predictions | None:
        """Begin rounds with batched drafts, if that reproduces the traced step; else note the reason."""
        forms = [(v.form, v.like) for v in learned.inputs.values() if isinstance(v.form, OfState)]
        whole = all(form.item is None and like.dim() > 0 for form, like in forms)
        program = learned.program.stacked({len(like) for _, like in forms}) if whole else None
        why = "a step has no one batch that drafts could be stacked along"
        if program is not None:
            predictions = self._bind(learned, program, sources, k)
            try:
                if predictions.agrees_stacked(min(self._context.evaluator.drafts_per_device, self._mode.width)):
                    return predictions
                why = "the samples of a batch depend on each other"
            except Exception as error:  # A module may fail for a larger batch.
                why = f"a larger batch could not be evaluated: {error}".splitlines()[0]
            predictions.close()
        self._report.notes[f"drafts of a device are evaluated one after the other: {why}"] = 1
        return None

    # Answering.

    def _answer(self, lesson: TracedStep, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the prediction for a call; raise UnrecognisedError for an unexpected call."""
        learned, step = lesson.learned, self._step
        number, k = step.position, self._index
        tensors = learned.tensors_of(number, module, args, kwargs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise UnrecognisedError(f"a gradient is computed through {module}, which workers cannot do")
        if k is None or self._end is None or k >= self._end or self._stepped is None:
            raise UnrecognisedError("the pipeline takes more steps than its scheduler has timesteps")
        if step.x is None:
            step.x = self._expect(learned, tensors, k, self._stepped)
        learned.check(number, tensors, step.inputs, step.answered)
        for name in {call.module for call in learned.program.calls} if number == 0 else (module,):
            if not self._context.unchanged(name):
                raise UnrecognisedError(f"{name} itself was changed")
        if number == 0:
            try:
                settings = read_settings()
            except ValueError as error:
                raise UnrecognisedError(str(error)) from None
            if settings != learned.program.settings:
                raise UnrecognisedError("torch's settings, or the choice of attention kernels, were changed")
            stepped = None if step.exact else self._stepped
            step.outputs = lesson.predictions.at(k, step.x, step.inputs, stepped)
        step.position += 1
        result = learned.answer(number, step.outputs)
        step.answered.update({(number, place): tensor for place, tensor in enumerate(flatten(result)[1])})
        return result

    def _point(self, k: int, x: Tensor) -> Point:
        scale = scale_of(copy_of(self.scheduler, METHODS), self._drafter.timesteps[k])
        return Point(x, scale, self._drafter.numbers(k))

    def _expect(self, learned: Learned, tensors: list[Tensor], k: int, stepped: Tensor) -> Tensor:
        """Return the latents in the denoiser's arguments, and record which arguments follow from them."""
        step, point = self._step, self._point(k, stepped)
        leaves = learned.program.calls[0].leaves
        for leaf, tensor in zip(leaves, tensors, strict=True):
            varying = learned.inputs[leaf.name] if leaf.kind == "input" else None
            if varying is None or not isinstance(varying.form, OfState):
                continue
            if tensor.shape != varying.like.shape or tensor.dtype != varying.like.dtype:
                raise UnrecognisedError("the denoiser is given latents of another shape")
            if not alike(varying.at(point), tensor):
                # The pipeline, or a callback, changed the latents after the scheduler's step.
                step.exact = False
                point = self._point(k, varying.form.read(tensor, point))
                if not alike(varying.at(point), tensor):
                    raise UnrecognisedError("what is added to the latents has changed")
                step.inputs[leaf.name] = tensor
            if varying.form.item is None:
                break
        for name, varying in learned.inputs.items():
            if name not in step.inputs:
                step.inputs[name] = varying.at(point)
        return point.x


def _agree(read: Tensor, x: Tensor, exact: bool) -> bool:
    """Return whether these are the latents read from the denoiser's arguments, exactly or up to rounding."""
    if exact or read.shape != x.shape:
        return alike(read, x)
    return float((read.double() - x.double()).norm()) <= 0.02 * float(x.double().norm())
