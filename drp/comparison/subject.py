"""What is compared: something that can be sampled untouched, drafted and with fewer steps, seed by seed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from drp.comparison.settings import Drafted, FewerSteps
from drp.leader.leader import WorkerStatus
from drp.sampling.result import Result


@dataclass(frozen=True)
class Sample:
    """The samples of one seed.

    latents: the last state, float32 [B, ...] in host memory.
    images: uint8 [I, 3 or 1, H, W], the frames of a video one after the other; None if the samples are no pictures.
    seconds: the wall time of the call.
    sampling_seconds: of that, from the first evaluation to the last step.
    rounds, evaluations: as counted by the run.
    steps: the steps of the solver.
    reason: why there were no drafts although the mode has them; empty if there were.
    """

    latents: Tensor
    images: Tensor | None
    seconds: float
    sampling_seconds: float
    rounds: int
    evaluations: int
    steps: int
    reason: str = ""


class SubjectSession(ABC):
    """The workers and the pipeline while one setting is measured."""

    @abstractmethod
    def sample(self, seed: int, trace: Path | None = None, **changed: Any) -> Sample:
        """Sample in the setting, with some arguments of a pipeline's call changed.

        With `trace`, write a trace of the run to that file if workers take part.
        """

    @abstractmethod
    def untouched(self, seed: int) -> Sample:
        """Sample without drp, between samples of the setting."""


class Subject(AbstractContextManager["Subject"]):
    """A model or a pipeline with the arguments of its call.

    facts: everything that the samples depend on, as JSON. Cells of an earlier comparison with other facts are not used.
    baseline: a description of the untouched run.
    steps: the steps of the untouched run.
    adds_noise: the solver adds noise, for which drafting has other defaults.
    devices: the names of the devices that drafts are evaluated on.
    capacity: the number of drafts that they evaluate at once.
    """

    facts: Mapping[str, Any]
    baseline: str
    steps: int
    adds_noise: bool
    devices: tuple[str, ...]
    capacity: int

    @abstractmethod
    def check(self, setting: Drafted | FewerSteps) -> None:
        """Raise ValueError for a setting that cannot be, before any work."""

    @abstractmethod
    def session(self, setting: Drafted | FewerSteps) -> AbstractContextManager[SubjectSession]:
        """Prepare to sample alternately in a setting and untouched."""

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """Return the bytes that are in use on each device: by its worker, or on a GPU by everything."""

    @property
    def can_batch(self) -> bool:
        """Whether devices can evaluate several drafts as one batch, and are not emulated."""
        return False

    def batched(self, size: int) -> Subject:
        """Return the same subject with batches of `size` drafts per device."""
        raise NotImplementedError

    def timed(self) -> Subject:
        """Return the subject whose times are measured; with emulated devices, its samples are not the model's."""
        return self

    def reference(self, setting: Drafted | None, seed: int) -> Result:
        """Sample in this process; None is the untouched run. Only subjects with emulated devices implement this."""
        raise NotImplementedError

    def emulation_notes(self, evaluation: float) -> list[str]:
        """Describe how times and samples of emulated devices were obtained.

        evaluation: the seconds of one evaluation of the model in this process.
        """
        raise NotImplementedError

    @abstractmethod
    def code(self, setting: Drafted | FewerSteps) -> str:
        """Return the lines of Python that sample so."""


def worker_memory(workers: Sequence[WorkerStatus]) -> dict[str, int]:
    """Return the bytes that are in use on each device: on a GPU by everything, else by its worker."""
    found = {}
    for status in workers:
        name = f"{status.number}: {status.device}"
        if status.device.startswith("cuda:"):
            free, total = torch.cuda.mem_get_info(torch.device(status.device))
            found[name] = total - free
        elif status.pid is not None:
            # Pages that processes share, such as weights, are divided among them.
            found[name] = int(psutil.Process(status.pid).memory_full_info().pss)
    return found


def to_pixels(images: Tensor) -> Tensor:
    """Return float images [I, C, H, W] in [0, 1] as uint8, rounded."""
    return (images.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)


def threads_in_words(count: int) -> str:
    """Return a number of threads in words."""
    return "one thread" if count == 1 else f"{count} threads"


def as_count(devices: Any) -> Any:
    """Return devices, with a count that is text, as on the command line, as an int."""
    return int(devices) if isinstance(devices, str) and devices.isdecimal() else devices


def arguments(options: Mapping[str, Any]) -> str:
    """Return keyword arguments as Python."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
