"""Parallel: the context in which a pipeline's denoiser is answered from drafts; see `parallelize`."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any, cast

import torch
from torch import nn

from drp.diffusers.call import PipelineCall, PipelineContext
from drp.diffusers.evaluators import Evaluator, InProcess
from drp.diffusers.publish import Publisher
from drp.diffusers.pytree import Json
from drp.diffusers.report import CallReport, Report
from drp.diffusers.structure import Described, describe
from drp.diffusers.workers import Workers
from drp.leader.devices import expand_count, parse_devices
from drp.sampling.drafts import DraftRule, find_rule
from drp.sampling.modes import Mode, Warmup, make_mode
from drp.trace.record import check

DENOISERS = ("unet", "transformer", "transformer_2", "controlnet", "prior")
"""Components of a pipeline that its steps call."""


class Parallel:
    """A pipeline while it is parallelised. `report` says what happened in each of its calls."""

    def __init__(self, pipe: Any, mode: Mode, names: Sequence[str], split: bool) -> None:
        self.report = Report()
        self._split = split
        self._pipe, self._mode = pipe, mode
        self._modules = {name: getattr(pipe, name) for name in names}
        self._schedulers: list[Any] = []
        self._call: PipelineCall | None = None
        self._fresh = True
        self._described: dict[str, Described] = {}
        self._publisher: Publisher | None = None
        self._evaluator: Evaluator | None = None

    @property
    def originals(self) -> dict[str, types.MethodType]:
        """The modules' own forward methods."""
        return {name: types.MethodType(type(module).forward, module) for name, module in self._modules.items()}

    def enter(self, evaluator: Evaluator, publisher: Publisher | None) -> None:
        """Begin to answer the denoiser's calls."""
        if any("forward" in vars(module) for module in self._modules.values()):
            raise ValueError(
                f"{type(self._pipe).__name__} is parallelised already, or a hook took its denoiser's forward; "
                "leave that first"
            )
        self._evaluator, self._publisher = evaluator, publisher
        self._originals = self.originals
        for name, module in self._modules.items():
            module.forward = Hook(functools.partial(self._evaluate, name), self._originals[name])
        self._watch(self._pipe.scheduler)

    def leave(self) -> None:
        """Make the pipeline what it was."""
        for module in self._modules.values():
            vars(module).pop("forward", None)
        for scheduler in self._schedulers:
            for name in ("step", "set_timesteps"):
                vars(scheduler).pop(name, None)
        if self._call is not None:
            self._call.close()

    def _watch(self, scheduler: Any) -> None:
        """Be told of a scheduler's steps."""
        self._schedulers.append(scheduler)
        step, set_timesteps = scheduler.step, scheduler.set_timesteps

        @functools.wraps(step)
        def watched_step(*args: Any, **kwargs: Any) -> Any:
            return self._call.step(step, args, kwargs) if self._call is not None else step(*args, **kwargs)

        @functools.wraps(set_timesteps)
        def watched_set_timesteps(*args: Any, **kwargs: Any) -> Any:
            self._fresh = True
            return set_timesteps(*args, **kwargs)

        scheduler.step, scheduler.set_timesteps = watched_step, watched_set_timesteps

    def _evaluate(self, name: str, *args: Any, **kwargs: Any) -> Any:
        scheduler = self._pipe.scheduler
        if not any(scheduler is watched for watched in self._schedulers):
            self._watch(scheduler)  # It was exchanged.
            self._fresh = True
        if self._fresh:
            self._begin(scheduler)
        assert self._call is not None
        return self._call.evaluate(name, args, kwargs)

    def _begin(self, scheduler: Any) -> None:
        assert self._evaluator is not None
        if self._call is not None:
            self._call.close()
        self._fresh = False
        mode = self._mode
        report = CallReport(type(mode).__name__.lower(), mode.width, self._evaluator.devices)
        self.report.calls.append(report)
        work = PipelineContext(
            self._pipe,
            mode,
            self._originals,
            self._evaluator,
            self._split,
            self._publish,
            self._unchanged,
            self._config,
        )
        self._call = PipelineCall(work, scheduler, report)

    def publish(self, publisher: Publisher | None, name: str) -> Json:
        """Describe a module, and put it where workers find it; raise ValueError if it cannot be described."""
        module = self._modules[name]
        described = self._described[name] = describe(module, lambda value: isinstance(value, Hook))
        return None if publisher is None else publisher.publish(name, module, described)

    def _publish(self, name: str) -> Json:
        return self.publish(self._publisher, name)

    def _unchanged(self, name: str) -> bool:
        """Return whether a module is still as it was described last."""
        described = self._described[name]
        if described.untouched():
            return True
        now = describe(self._modules[name], lambda value: isinstance(value, Hook))
        if not now.same(described):
            return False
        self._described[name] = now
        return True

    def _config(self, name: str) -> Mapping[str, Any]:
        return getattr(self._modules[name], "config", {})


class Hook:
    """Stands in for a module's `forward`."""

    def __init__(self, evaluate: Callable[..., Any], original: Callable[..., Any]) -> None:
        self._evaluate = evaluate
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(*args, **kwargs)


@contextmanager
def parallelize(
    pipe: Any,
    devices: int | str | Sequence[str] | Workers = 2,
    mode: str | Mode = "window",
    *,
    drafts: int | None = None,
    stride: float | None = None,
    rule: str | DraftRule | None = None,
    tolerance: float = 0.0025,
    warmup: int = 0,
    split_guidance: bool = False,
    threads: int | None = None,
    denoisers: Sequence[str] | None = None,
    start_timeout: float = 120.0,
    draft_timeout: float | None = 600.0,
    trace: str | os.PathLike[str] | None = None,
    trace_most: int | None = None,
) -> Iterator[Parallel]:
    """Spread the steps of a diffusers pipeline's calls over several devices, inside a `with`.

        with parallelize(pipe, devices=4) as run:
            image = pipe("an astronaut on a horse").images[0]
        print(run.report)

    The pipeline's own code runs as ever, in this process and thread; only the calls of its denoiser are answered from
    drafts that worker processes have evaluated. After the `with` the pipeline is what it was, and the workers are gone;
    its weights have moved into shared memory, one copy for all.

    devices: a count, of the kind that the pipeline runs on; or names, as of `drp.Leader`; or `Workers`, which several
        pipelines may share.
    mode, drafts, stride, rule, tolerance, warmup: as of `drp.sample` (docs/drafts.md); modes that go back to steps that
        were taken, or leave some out, are refused: rolling, windows with gaps, and those with sweeps.
    split_guidance: evaluate the two branches of classifier-free guidance on two devices, so that a round has half as
        many drafts as devices. Where they are one doubled batch, halves may have other bits than the whole.
    threads: of each worker; by default an equal share of this process's. Bits may depend on it.
    denoisers: the names of the components that the steps call, if they are called unusually.
    start_timeout, draft_timeout: as of `drp.Leader`.
    trace: a file to write what happened where and when to, see `drp.trace`; with at most `trace_most` marks.

    Raises ValueError for a pipeline or arguments that cannot be, WorkerError if a worker cannot start or, from the
    pipeline's call, if one is lost. Steps of which it cannot be made sure that drafts are right are taken sequentially,
    in this process; `run.report` says which, and why.
    """
    if trace is not None:
        check(trace)
    names = _denoisers(pipe, denoisers)
    own = devices if isinstance(devices, Workers) else None
    if not isinstance(devices, Workers):
        devices = expand_count(devices, _kind(pipe, names))
    count = len(own.devices if own else parse_devices(cast("str | Sequence[str]", devices), 1))
    drafts = _drafts(drafts, count, split_guidance)
    parallel = Parallel(pipe, make(mode, drafts, rule, tolerance, warmup, stride), names, split_guidance)
    with ExitStack() as stack:
        publisher = stack.enter_context(closing(Publisher()))
        for name in names:  # Before workers start: what cannot be described is refused.
            parallel.publish(publisher, name)
        workers = own or stack.enter_context(
            Workers(
                cast("str | Sequence[str]", devices),
                threads=threads,
                start_timeout=start_timeout,
                draft_timeout=draft_timeout,
            )
        )
        if trace is not None:
            stack.enter_context(workers.record(trace, trace_most))
        parallel.enter(workers, publisher)
        stack.callback(parallel.leave)
        yield parallel


@contextmanager
def reference(
    pipe: Any,
    *,
    devices: int | str | Sequence[str] = 1,
    mode: str | Mode = "window",
    drafts: int | None = None,
    stride: float | None = None,
    rule: str | DraftRule | None = None,
    tolerance: float = 0.0025,
    warmup: int = 0,
    split_guidance: bool = False,
    threads: int | None = None,
    denoisers: Sequence[str] | None = None,
) -> Iterator[Parallel]:
    """Do in this process what `parallelize` does with the same arguments on workers: the bits are the same.

    `devices` only counts, for the drafts a round.
    """
    names = _denoisers(pipe, denoisers)
    placed = parse_devices(expand_count(devices, _kind(pipe, names)), 1)
    own = threads or max(1, torch.get_num_threads() // len(placed))
    drafts = _drafts(drafts, len(placed), split_guidance)
    parallel = Parallel(pipe, make(mode, drafts, rule, tolerance, warmup, stride), names, split_guidance)
    parallel.enter(InProcess(parallel.originals, own), None)
    try:
        yield parallel
    finally:
        parallel.leave()


def make(
    mode: str | Mode,
    drafts: int,
    rule: str | DraftRule | None,
    tolerance: float,
    warmup: int,
    stride: float | None = None,
) -> Mode:
    """Return the mode that the arguments describe; raise ValueError if a pipeline's steps can't be taken in it."""
    if not isinstance(mode, str) and stride is not None:
        raise ValueError(f"mode is {mode}, an object that says itself by how much it moves on; leave out stride")
    made = make_mode(mode, drafts, tolerance, find_rule(rule), stride) if isinstance(mode, str) else mode
    if warmup:
        made = Warmup(made, warmup)
    if made.pipelined or not (made.feedback or _goes_on(made)):
        raise ValueError(
            f"mode {mode!r} goes back to steps that a pipeline has already taken, or leaves some out; "
            "choose window, aggressive, conservative, adaptive or sequential"
        )
    return made


def _goes_on(mode: Mode, steps: int = 24) -> bool:
    """Return whether every round predicts indices in a row from the next step on, and the first that step alone.

    The next step is the base, alone, or the one after it; and it is further on than that of the round before.
    """
    known, after = 0, -1
    for r in mode.rounds(steps):
        k = r.predict[0]
        if not after < k <= known or r.predict != tuple(range(k, k + len(r.predict))):
            return False
        if r.base != k - 1 and (r.base != k or len(r.predict) > 1):
            return False
        known, after = max(known, r.predict[-1] + 1), k
    return known == steps


def _drafts(drafts: int | None, devices: int, split: bool) -> int:
    """Return the drafts a round: by default one a device, or one for two devices."""
    return drafts if drafts is not None else max(1, devices // 2) if split else devices


def _kind(pipe: Any, names: Sequence[str]) -> str:
    """Return the kind of device that a pipeline runs on, as torch calls it."""
    device = getattr(pipe, "_execution_device", None)  # which it may only be brought to while it runs
    if device is None:
        device = next((parameter.device for parameter in getattr(pipe, names[0]).parameters()), torch.device("cpu"))
    return str(device.type)


def _denoisers(pipe: Any, denoisers: Sequence[str] | None) -> list[str]:
    """Return the names of the components that the pipeline's steps call."""
    if not hasattr(pipe, "scheduler"):
        raise ValueError(f"{type(pipe).__name__} has no scheduler, whose steps drp would draft")
    names = [n for n in denoisers or DENOISERS if isinstance(getattr(pipe, n, None), nn.Module)]
    if not names or (denoisers and len(names) < len(denoisers)):
        wanted = ", ".join(denoisers or DENOISERS)
        raise ValueError(f"{type(pipe).__name__} lacks {wanted}; name its denoising modules in `denoisers`")
    return names
