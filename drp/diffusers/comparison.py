"""`drp.diffusers.compare`: a pipeline of diffusers as the subject of a comparison; see `drp.comparison`."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from drp.comparison.api import MODES, Comparison, plan, run
from drp.comparison.measure import Progress
from drp.comparison.models import facts_of
from drp.comparison.settings import Drafted, FewerSteps
from drp.comparison.subject import (
    Sample,
    Subject,
    SubjectSession,
    arguments,
    as_count,
    threads_in_words,
    to_pixels,
    worker_memory,
)
from drp.diffusers.parallel import parallelize
from drp.diffusers.parallel_pipeline import Parallel
from drp.diffusers.pipeline_modes import make_pipeline_mode
from drp.diffusers.scheduler import adds_noise
from drp.diffusers.watch import WatchedMethod, schedulers_of
from drp.diffusers.workers import Workers
from drp.leader.devices import expand_count, parse_devices
from drp.sampling.mode_selection import DEFAULT_TOLERANCE

STEPS = 50
"""The number of steps if neither the call nor the pipeline's default defines it."""


def compare(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    devices: int | str | Sequence[str] = 2,
    modes: Sequence[str] = MODES,
    drafts: Sequence[int] | None = None,
    strides: Sequence[float] = (),
    tolerances: Sequence[float] = (),
    rule: str | None = None,
    rivals: bool = False,
    seeds: int | Sequence[int] = 8,
    turns: int = 3,
    max_distance: float | None = None,
    min_speedup: float | None = None,
    clip: str | None = None,
    out: str | os.PathLike[str] = "report",
    force: bool = False,
    threads: int | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    **parallelize_options: Any,
) -> Comparison:
    """Measure modes and numbers of drafts on a diffusers pipeline against the untouched pipeline, and write a report.

        drp.diffusers.compare(pipe, {"prompt": "an astronaut on a horse"}, devices=4)

    call: the arguments of the pipeline's call, without the generator, which is seeded for each sample.
    name: the pipeline's name in the report and its code; by default the name from which it was loaded.
    parallelize_options: further arguments of `parallelize`, such as split_guidance, for every drafted setting.

    Pictures are compared if the call returns any, in [0, 1] if the pipeline has an argument `output_type`, else in
    [-1, 1]. Latents are the result of the scheduler's last step. The other arguments are those of `drp.compare`. Rivals
    with another solver use UniPC with the configuration of the pipeline's own scheduler.
    """
    subject = PipelineSubject(pipe, call, devices, threads=threads, name=name, **parallelize_options)
    settings = plan(subject, modes, drafts, strides, tolerances, rule, rivals)
    return run(subject, settings, seeds, turns, max_distance, min_speedup, clip, out, force, progress)


class PipelineSubject(Subject):
    """A pipeline with the arguments of its call. The untouched run is the pipeline without drp, on its own device."""

    def __init__(
        self,
        pipe: Any,
        call: Mapping[str, Any],
        devices: int | str | Sequence[str] = 2,
        *,
        threads: int | None = None,
        name: str | None = None,
        **parallelize_options: Any,
    ) -> None:
        self.pipe, self._call = pipe, dict(call)
        parameters = inspect.signature(pipe.__call__).parameters
        unknown = [each for each in self._call if each not in parameters]
        if unknown:
            raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]}; it takes {', '.join(parameters)}")
        if "generator" in self._call or "generator" not in parameters:
            raise ValueError(
                f"{type(pipe).__name__}: the generator is seeded for each sample; leave it to the comparison"
            )
        self._has_output_type = "output_type" in parameters
        if self._has_output_type:
            self._call.setdefault("output_type", "pt")
        default = parameters["num_inference_steps"].default if "num_inference_steps" in parameters else None
        self.steps = int(self._call.get("num_inference_steps", default if isinstance(default, int) else STEPS))
        self.adds_noise = adds_noise(pipe.scheduler)
        kind = str(getattr(pipe, "_execution_device", torch.device("cpu")).type)
        self._places = expand_count(devices, kind)
        self.devices = tuple(device.name for device in parse_devices(self._places, 1))
        split = bool(parallelize_options.get("split_guidance"))
        self.capacity = max(1, len(self.devices) // 2) if split else len(self.devices)
        self._threads, self._parallelize_options, self._asked = threads, parallelize_options, devices
        self._name = name or str(getattr(pipe, "name_or_path", "") or "") or type(pipe).__name__
        where = threads_in_words(torch.get_num_threads()) if kind == "cpu" else kind
        self.baseline = f"{type(pipe).__name__} without drp, {where}"
        self.facts = {
            "pipeline": self._name,
            "scheduler": type(pipe.scheduler).__name__,
            "devices": list(self.devices),
            "threads": threads,
            "call": facts_of({k: v for k, v in self._call.items() if k != "output_type"}),
            "parallelize": facts_of(parallelize_options),
        }
        self._workers: Workers | None = None

    def __enter__(self) -> PipelineSubject:
        self._workers = Workers(self._places, threads=self._threads)
        return self

    def __exit__(self, *_: object) -> None:
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def memory(self) -> dict[str, int]:
        assert self._workers is not None
        return worker_memory(self._workers.status)

    def check(self, setting: Drafted | FewerSteps) -> None:
        if isinstance(setting, FewerSteps):
            if "num_inference_steps" not in inspect.signature(self.pipe.__call__).parameters:
                raise ValueError(f"{type(self.pipe).__name__} takes no num_inference_steps; leave out rivals")
            return
        tolerance = DEFAULT_TOLERANCE if setting.tolerance is None else setting.tolerance
        make_pipeline_mode(setting.mode, setting.drafts, setting.rule, tolerance, 0, setting.stride)

    @contextmanager
    def session(self, setting: Drafted | FewerSteps) -> Iterator[SubjectSession]:
        if isinstance(setting, FewerSteps):
            yield _Sequential(self, setting)
            return
        assert self._workers is not None
        with parallelize(self.pipe, self._workers, **self._parallelize_options, **setting.options) as parallel:
            yield _Drafted(self, parallel, self._workers)

    def code(self, setting: Drafted | FewerSteps) -> str:
        call = {name: value for name, value in self._call.items() if name != "output_type"}
        if isinstance(setting, FewerSteps):
            line = f"pipe({arguments({**call, 'num_inference_steps': setting.steps})})"
            better = "pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config"
            return f"{better}{_unipc_arguments(self.pipe.scheduler)})\n{line}" if setting.solver else line
        parallelize_options = arguments(
            {"devices": as_count(self._asked), **self._parallelize_options, **setting.options}
        )
        return f"with drp.diffusers.parallelize(pipe, {parallelize_options}):\n    pipe({arguments(call)})"

    def sample(self, seed: int, **changed: Any) -> Sample:
        """Call the pipeline with some arguments changed."""
        with _Steps(self.pipe) as steps:
            generator = torch.Generator().manual_seed(seed)
            began = time.perf_counter()
            output = self.pipe(**{**self._call, **changed}, generator=generator)
            found = next(iter(output.values())) if hasattr(output, "values") else output[0]
            pictures = self._pictures(found)
            latents = steps.latents.detach().float().cpu()  # A GPU has finished the call only now.
            seconds = time.perf_counter() - began
        if not steps.count:
            raise ValueError(f"{type(self.pipe).__name__} has called no step of its scheduler, so it has no latents")
        return Sample(
            latents=latents,
            images=pictures,
            seconds=seconds,
            sampling_seconds=seconds,
            rounds=steps.count,
            evaluations=steps.count,
            steps=steps.count,
        )

    def _pictures(self, found: Any) -> Tensor | None:
        """Return the pictures of a call's output, uint8 [I, C, H, W]."""
        if self._call.get("output_type") == "latent":
            return None
        if isinstance(found, np.ndarray):
            found = torch.from_numpy(found).movedim(-1, -3)
        elif isinstance(found, list):
            flat = [each for part in found for each in (part if isinstance(part, list) else [part])]
            found = torch.stack([torch.from_numpy(np.array(each.convert("RGB"))).movedim(-1, 0) for each in flat]) / 255
        if not isinstance(found, Tensor) or found.dim() < 4 or found.shape[-3] not in (1, 3):
            return None
        unit = found if self._has_output_type else found / 2 + 0.5
        return to_pixels(unit.reshape(-1, *found.shape[-3:]))


class _Drafted(SubjectSession):
    """The pipeline parallelized on workers. Between calls it is unchanged."""

    def __init__(self, subject: PipelineSubject, parallel: Parallel, workers: Workers) -> None:
        self._subject, self._parallel, self._workers = subject, parallel, workers

    def sample(self, seed: int, trace: Path | None = None, **changed: Any) -> Sample:
        with ExitStack() as stack:
            if trace is not None:
                stack.enter_context(self._workers.record(trace))
            self._parallel.report.calls.clear()
            sample = self._subject.sample(seed, **changed)
        calls = self._parallel.report.calls
        rounds, evaluations = sum(call.rounds for call in calls), sum(call.evaluations for call in calls)
        reason = "; ".join(dict.fromkeys(call.reason for call in calls if call.reason))
        sampling = sum(call.seconds for call in calls)
        return replace(sample, sampling_seconds=sampling, rounds=rounds, evaluations=evaluations, reason=reason)

    def untouched(self, seed: int) -> Sample:
        with self._parallel.paused():
            return self._subject.sample(seed)


class _Sequential(SubjectSession):
    """The pipeline without drp, with fewer steps and possibly another scheduler."""

    def __init__(self, subject: PipelineSubject, setting: FewerSteps) -> None:
        self._subject, self._setting = subject, setting

    def sample(self, seed: int, trace: Path | None = None, **changed: Any) -> Sample:
        pipe = self._subject.pipe
        own = pipe.scheduler
        if self._setting.solver is not None:
            more = _unipc_options(own)
            pipe.scheduler = UniPCMultistepScheduler.from_config(own.config, **more)
        try:
            return self._subject.sample(seed, **changed, num_inference_steps=self._setting.steps)
        finally:
            pipe.scheduler = own

    def untouched(self, seed: int) -> Sample:
        return self._subject.sample(seed)


def _unipc_options(scheduler: Any) -> dict[str, Any]:
    """Return the options of UniPC in addition to the configuration of a flow-matching scheduler."""
    config = scheduler.config
    if "FlowMatch" not in type(scheduler).__name__ and config.get("prediction_type") != "flow_prediction":
        return {}
    shift = config.get("flow_shift", config.get("shift", 1.0))
    return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}


def _unipc_arguments(scheduler: Any) -> str:
    options = arguments(_unipc_options(scheduler))
    return f", {options}" if options else ""


class _Steps:
    """Counts the steps of a pipeline's schedulers during a block, and keeps the latents of the last one."""

    def __init__(self, pipe: Any) -> None:
        self.count, self.latents = 0, torch.empty(0)
        self._pipe, self._methods = pipe, ExitStack()

    def __enter__(self) -> _Steps:
        for scheduler in schedulers_of(self._pipe):
            self._methods.callback(WatchedMethod(scheduler, "step", self._step).undo)
        return self

    def __exit__(self, *_: object) -> None:
        self._methods.close()

    def _step(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        stepped = original(*args, **kwargs)
        self.count += 1
        self.latents = stepped[0] if isinstance(stepped, tuple) else stepped.prev_sample
        return stepped
