"""A model of drp, built in or of the user's own, as the subject of a comparison."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from drp import models
from drp.api import check_options, reference
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
from drp.leader.devices import Device
from drp.leader.job import make_job, solver_of
from drp.leader.leader import Leader, model_name
from drp.leader.options import LeaderOptions
from drp.leader.request import Request, RequestArguments
from drp.sampling.reference import run_reference
from drp.sampling.result import Result
from drp.torch_defaults import torch_defaults
from drp.torch_threads import torch_threads
from drp.trace.record import record

OF_SETTINGS = (
    *("mode", "drafts", "stride", "tolerance", "rule", "target_speedup", "target_rounds", "offsets"),
    *("seed", "count", "noise", "out"),
)
"""Options of a run that a comparison sets itself."""


class ModelSubject(Subject):
    """A model, by name or factory, sampled with the options of `drp.sample`.

    The untouched run on CPU devices is the plain loop in this process, with as many threads as all workers together.
    On GPUs and emulated devices it is a sequential run on one of them.
    labels: sample i of a model with classes has the label i modulo their number; by default all classes in turn.
    """

    def __init__(
        self,
        model: str | Callable[[], Any] = "digits",
        leader: LeaderOptions | None = None,
        *,
        labels: Sequence[int] | Tensor | None = None,
        **options: Any,
    ) -> None:
        given = [name for name in OF_SETTINGS if name in options]
        if given:
            raise ValueError(
                f"{given[0]} is given, but a comparison tries several; name them in modes, drafts and so on"
            )
        self._name = model_name(model)
        self._leader_options = own = leader or LeaderOptions(devices=2)
        placed = own.worker_devices
        self.devices, self.capacity = tuple(device.name for device in placed), own.drafts
        self._labels = [int(label) for label in labels] if labels is not None else None
        self._options = {"steps": 48, **options}
        self.steps = int(self._options["steps"])
        self.adds_noise = solver_of(Request(**cast("RequestArguments", self._options))).adds_noise
        self._in_process = all(device.emulated is None and device.gpu is None for device in placed)
        self._threads = own.threads * len(placed)
        plain = f"the plain loop in one process, {threads_in_words(self._threads)}"
        self.baseline = plain if self._in_process else "sequential on one device"
        self.facts = {
            "model": self._name,
            "devices": list(self.devices),
            "threads": own.threads,
            "drafts_per_device": own.drafts_per_device,
            "execution": asdict(own.execution),
            "labels": self._labels,
            **facts_of(self._options),
        }
        self._leader: Leader | None = None
        self._denoiser: models.Denoiser | None = None

    def __enter__(self) -> ModelSubject:
        self._leader = Leader(self._name, self._leader_options)
        return self

    def __exit__(self, *_: object) -> None:
        if self._leader is not None:
            self._leader.close()
            self._leader = None

    def check(self, setting: Drafted | FewerSteps) -> None:
        spec = models.describe(self._name)
        labels = self._label(0, spec.classes) if spec is not None else self._label(0, None)
        check_options(self._name, self.capacity, cast("RequestArguments", self._run_options(setting, 0, labels)))

    @contextmanager
    def session(self, setting: Drafted | FewerSteps) -> Iterator[SubjectSession]:
        yield _ModelSession(self, setting)

    def memory(self) -> dict[str, int]:
        assert self._leader is not None
        return worker_memory(self._leader.workers)

    @property
    def can_batch(self) -> bool:
        return all(device.emulated is None for device in self._leader_options.worker_devices)

    def batched(self, size: int) -> ModelSubject:
        own = replace(self._leader_options, drafts_per_device=size)
        return ModelSubject(self._name, own, labels=self._labels, **self._options)

    def timed(self) -> ModelSubject:
        """Return this subject; with emulated devices, one whose workers compute a cheap function instead of the model.

        An emulated device stands for one with its own processor. Its worker evaluates the model on cores that all
        workers share, which can take longer than the device's own time.
        """
        placed = self._leader_options.worker_devices
        if not any(device.emulated for device in placed):
            return self
        local = [with_cheap_values(device) for device in placed if device.remote is None]
        remote = self._leader_options.remote
        own = replace(self._leader_options, devices=[*local, *([] if remote is None else [remote])])
        return ModelSubject(self._name, own, labels=self._labels, **self._options)

    def reference(self, setting: Drafted | None, seed: int) -> Result:
        assert self._leader is not None
        options = self._run_options(setting, seed, self._label(seed, self._leader.spec.classes))
        threads = self._leader_options.threads
        return reference(
            self._name, devices=f"{self.capacity}xcpu", threads=threads, **cast("RequestArguments", options)
        )

    def emulation_notes(self, evaluation: float) -> list[str]:
        emulated = [device.emulated for device in self._leader_options.worker_devices if device.emulated]
        name = self._name
        notes = [
            f"The emulated devices took their times without evaluating {name} (values=cheap), since a real device "
            f"would not compute on these cores. Distances are of samples of {name}, computed in this process."
        ]
        cores, shortest = len(os.sched_getaffinity(0)), min(e.seconds for e in emulated)
        needed = evaluation * self._leader_options.threads * len(emulated) / cores
        if needed > shortest:
            notes.append(
                f"Runs that do evaluate {name} on these emulated devices take longer: {len(emulated)} evaluations of "
                f"{evaluation * 1e3:.1f} ms at once take {needed * 1e3:.1f} ms on {cores} cores, and the devices "
                f"{shortest * 1e3:g} ms."
            )
        return notes

    def code(self, setting: Drafted | FewerSteps) -> str:
        found = models.describe(self._name) if self._leader is None else self._leader.spec
        label = self._label(0, found.classes if found is not None else None)
        labels = {} if label is None else {"labels": label}
        if isinstance(setting, FewerSteps):
            options = {**labels, **self._changed(setting), "mode": "sequential"}
            return f"drp.sample({self._name!r}, {arguments(options)})"
        own = self._leader_options
        places: dict[str, Any] = {"devices": as_count(own.devices)}
        places |= {"threads": own.threads} if own.threads > 1 else {}
        places |= {"drafts_per_device": own.drafts_per_device} if own.drafts_per_device > 1 else {}
        return f"drp.sample({self._name!r}, {arguments({**labels, **places, **self._options, **setting.options})})"

    def run(self, setting: Drafted | FewerSteps | None, seed: int, trace: Path | None = None) -> Sample:
        """Sample in a setting; None is the untouched run."""
        assert self._leader is not None
        labels = self._label(seed, self._leader.spec.classes)
        options = self._run_options(setting, seed, labels)
        in_process = self._in_process and not isinstance(setting, Drafted)
        with record(self._leader, trace) if trace is not None and not in_process else nullcontext():
            began = time.perf_counter()
            if in_process:
                result = self._plain(Request(**cast("RequestArguments", options)))
            else:
                result = self._leader.sample(**cast("RequestArguments", options))
            seconds = time.perf_counter() - began  # before the trace is written
        return Sample(
            latents=result.samples,
            images=_images(result.samples),
            seconds=seconds,
            sampling_seconds=result.seconds,
            rounds=result.rounds,
            evaluations=result.evaluations,
            steps=result.steps,
        )

    def _plain(self, request: Request) -> Result:
        """Run the plain loop in this process, under the settings of torch that workers have."""
        with torch_defaults(), torch_threads(self._threads):
            if self._denoiser is None:
                self._denoiser = models.load(self._name)
            job = make_job(request, self._denoiser.spec, 1)
            return run_reference(self._denoiser, job.solver, job.mode, job.start, job.cond, None, job.fresh)

    def _label(self, seed: int, classes: int | None) -> list[int] | None:
        labels = self._labels if self._labels is not None else range(classes) if classes else None
        return [labels[seed % len(labels)]] if labels is not None else None

    def _changed(self, setting: FewerSteps) -> dict[str, Any]:
        kept = {name: value for name, value in self._options.items() if name != "solver_options" or not setting.solver}
        changed = {**kept, "steps": setting.steps}
        return changed if setting.solver is None else {**changed, "solver": setting.solver}

    def _run_options(self, setting: Drafted | FewerSteps | None, seed: int, labels: list[int] | None) -> dict[str, Any]:
        options: dict[str, Any] = {**self._options, "seed": seed}
        if labels is not None:
            options["labels"] = labels
        if isinstance(setting, Drafted):
            return {**options, **setting.options}
        if isinstance(setting, FewerSteps):
            options |= self._changed(setting)
        return {**options, "mode": "sequential"}


class _ModelSession(SubjectSession):
    def __init__(self, subject: ModelSubject, setting: Drafted | FewerSteps) -> None:
        self._subject, self._setting = subject, setting

    def sample(self, seed: int, trace: Path | None = None, **changed: Any) -> Sample:
        assert not changed
        return self._subject.run(self._setting, seed, trace)

    def untouched(self, seed: int) -> Sample:
        return self._subject.run(None, seed)


def with_cheap_values(device: Device) -> str:
    """Return the name of a device; if it is emulated, of one that computes a cheap function in the model's place."""
    return device.name if device.emulated is None else re.sub(":values=[a-z]+", "", device.name) + ":values=cheap"


def _images(samples: Tensor) -> Tensor | None:
    """Return samples [B, 1 or 3, H, W] in [-1, 1] as pictures."""
    if samples.dim() != 4 or samples.shape[1] not in (1, 3):
        return None
    return to_pixels(torch.nan_to_num(samples) / 2 + 0.5)


def facts_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as JSON; values that are neither numbers nor text become their repr."""
    return {name: value if isinstance(value, (int, float, str)) else repr(value) for name, value in options.items()}
