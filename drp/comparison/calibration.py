"""Calibration: the times of rounds and batches on the devices, from a few runs, and what follows for other runs."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from drp.comparison.settings import Drafted, default_drafts
from drp.comparison.subject import Sample, Subject, SubjectSession
from drp.leader.scheduling.policies import Barrier
from drp.protocol.messages import Emulated
from drp.simulate import SimulatedDevice, Workload, simulate
from drp.trace import read
from drp.trace.evaluations import evaluations

BATCHES = (2, 4)
MIN_CALLS, MAX_CALLS = 3, 9
CALLS_SECONDS = 3.0
"""A setting's time is the median of as many calls as take CALLS_SECONDS, but MIN_CALLS to MAX_CALLS."""
STEEP, BENT = 0.1, 0.05
"""Numbers of drafts between two measured ones are measured too if the rounds of those two differ by more than STEEP,
and again if the one between is off the straight line by more than BENT."""

Report = Callable[[str], None]
"""Called with what is being done."""


@dataclass(frozen=True)
class RoundTime:
    """The time of a round in seconds: of its slowest evaluation, and the additional time of the round."""

    slowest: float
    loss: float

    @property
    def seconds(self) -> float:
        return self.slowest + self.loss


@dataclass(frozen=True)
class Calibration:
    """What was measured on the devices; times in seconds.

    devices: the number of devices.
    rounds: the time of a round by the number of drafts that are evaluated at once, one per device. Devices that share
        cores or memory take longer for more drafts.
    batches: the slowest evaluation while every device evaluates a batch of drafts, by the size of the batches.
    fixed: the time of a call before the first evaluation and after the last step.
    memory: bytes, by the name of each device.
    untouched: a call without drp.
    """

    devices: int
    rounds: dict[int, RoundTime]
    batches: dict[int, float]
    fixed: float
    memory: dict[str, int]
    untouched: float

    def seconds(self, width: int, batch: int = 1) -> float:
        """Return the time of a round of `width` drafts, up to `batch` a device.

        It lies on the straight line through the nearest two rounds that were measured.
        """
        devices = -(-width // batch)
        if batch > 1 and width > 1:
            slowest = self._at(devices, lambda r: r.slowest)
            return slowest * self.batch_ratio(batch) + self._at(devices, lambda r: r.loss)
        return self._at(devices, lambda r: r.seconds)

    def batch_ratio(self, size: int) -> float:
        """Return how many times as long as one draft a batch takes, while all devices evaluate."""
        return self.batches[size] / self._at(self.devices, lambda r: r.slowest)

    def _at(self, width: int, of: Callable[[RoundTime], float]) -> float:
        known = sorted(self.rounds)
        low = max((w for w in known[:-1] if w <= width), default=known[0])
        high = next((w for w in known if w > low), low)
        first, second = of(self.rounds[low]), of(self.rounds[high])
        slope = (second - first) / (high - low) if high > low else 0.0
        if width > known[-1]:
            return max(0.0, second + max(0.0, slope) * (width - high))  # More drafts at once are never faster.
        return max(0.0, first + slope * (width - low))


@dataclass(frozen=True, kw_only=True)
class _TimedDevice(SimulatedDevice):
    """A device whose evaluations take as long as a round with as many drafts, in batches of `batch`."""

    calibration: Calibration
    batch: int

    def seconds(self, run: int, step: int, draws: random.Random, width: int = 1) -> float:
        return self.calibration.seconds(width, self.batch)


class _Calibrator:
    """Measures runs of the aggressive mode, whose rounds all have the same number of drafts."""

    def __init__(self, subject: Subject, trace: Path, report: Report) -> None:
        self._subject, self._trace, self._report = subject, trace, report
        self._samples: dict[int, list[Sample]] = {}
        self._slowest: dict[int, float] = {}
        self._untouched: list[Sample] = []
        self._exact: Sample | None = None

    def measure(self, width: int) -> None:
        """Measure runs with `width` drafts per round."""
        self._report(f"measuring rounds of {width}")
        with self._subject.session(_of_width(width)) as session:
            self._samples[width], self._slowest[width] = _measure_rounds(session, width, self._trace)
            if self._exact is None:
                self._exact = session.untouched(0)  # The first call, whose time has one-time costs in it.
            self._untouched.append(session.untouched(0))

    def measure_between(self, low: int, high: int) -> None:
        """Measure in the middle of two numbers that were measured, as long as times are not on a straight line."""
        middle = (low + high) // 2
        if middle in (low, high):
            return
        line = self._slowest[low] + (self._slowest[high] - self._slowest[low]) * (middle - low) / (high - low)
        self.measure(middle)
        if abs(self._slowest[middle] / line - 1) > BENT:
            self.measure_between(low, middle)
            self.measure_between(middle, high)

    def is_steep(self, low: int, high: int) -> bool:
        return self._slowest[high] > (1 + STEEP) * self._slowest[low]

    def result(self) -> Calibration:
        """Return what was measured.

        What a run takes besides the slowest evaluations is the loss, divided among its rounds. The first round of every
        run has one draft, and loses as much as the rounds of the sequential run.
        """
        untouched = statistics.median(sample.seconds for sample in self._untouched)
        devices = len(self._subject.devices)
        known = Calibration(devices, {w: RoundTime(s, 0.0) for w, s in self._slowest.items()}, {}, 0.0, {}, untouched)
        found: dict[int, RoundTime] = {}
        for width, samples in sorted(self._samples.items()):
            sampling = statistics.median(sample.sampling_seconds for sample in samples)
            rest = sampling - simulated_seconds(_of_width(width), self._subject.steps, known, 1)
            if width == 1:
                found[1] = known.rounds[1] = RoundTime(self._slowest[1], rest / samples[0].rounds)
            else:
                found[width] = RoundTime(self._slowest[width], rest / (samples[0].rounds - 1))
        every = [sample for samples in self._samples.values() for sample in samples]
        fixed = statistics.median(sample.seconds - sample.sampling_seconds for sample in every)
        return Calibration(devices, found, {}, fixed, self._subject.memory(), untouched)

    @property
    def exact(self) -> Sample:
        assert self._exact is not None
        return self._exact


def calibrate(subject: Subject, trace: Path, report: Report) -> tuple[Calibration, Sample]:
    """Measure rounds of 1, 2, 4, ... and all drafts, and of numbers between where devices slow each other down."""
    calibrator = _Calibrator(subject, trace, report)
    most = min(max(2, len(subject.devices)), largest_drafts(subject.steps))
    widths = [1, *(n for n in default_drafts(most) if n <= most)]
    for width in widths:
        calibrator.measure(width)
    for low, high in itertools.pairwise(widths):
        if calibrator.is_steep(low, high):
            calibrator.measure_between(low, high)
    return calibrator.result(), calibrator.exact


def _measure_rounds(session: SubjectSession, width: int, trace: Path) -> tuple[list[Sample], float]:
    """Return the samples of warm calls, and the median over them of `round_seconds`."""
    samples, slowest = [], []
    for _ in range(call_count(session.sample(0).seconds)):
        samples.append(session.sample(0, trace))
        slowest.append(round_seconds(trace, width))
    return samples, statistics.median(slowest)


def call_count(seconds: float) -> int:
    """Return the number of calls to measure of a setting whose calls take `seconds`."""
    return max(MIN_CALLS, min(MAX_CALLS, int(CALLS_SECONDS / seconds)))


def _of_width(width: int) -> Drafted:
    return Drafted("sequential", 1) if width == 1 else Drafted("aggressive", width)


def largest_drafts(steps: int) -> int:
    """Return the maximum number of drafts per round that is worth trying."""
    return max(2, steps // 3)


def round_seconds(trace: Path, width: int) -> float:
    """Return the mean time of the slowest evaluation in the recorded rounds that have `width` drafts."""
    events, _, _ = read(trace)
    found: dict[int, list[float]] = {}
    for e in evaluations(events):
        if e.answered is not None:
            found.setdefault(id(e.scheduled), []).append(e.seconds)
    slowest = [max(times) for times in found.values() if len(times) == width]
    if not slowest:
        raise ValueError(f"no round of {width} drafts was recorded: the run has too few steps for so many; take more")
    return statistics.fmean(slowest)


def time_batches(subject: Subject, trace: Path, report: Report) -> dict[int, float]:
    """Return the times of batches on all devices at once, by their size, where devices evaluate batches."""
    found = {}
    for size in BATCHES if subject.can_batch else ():
        width = size * len(subject.devices)
        if width <= largest_drafts(subject.steps):
            report(f"measuring batches of {size}")
            batched = subject.batched(size)
            with batched, batched.session(_of_width(width)) as session:
                _, found[size] = _measure_rounds(session, width, trace)
    return found


def simulated_seconds(
    setting: Drafted, steps: int, calibration: Calibration, batch: int, adds_noise: bool = False
) -> float:
    """Return the simulated time of a run with a device for each draft, or each batch of drafts."""
    mode = setting.make_mode(adds_noise)
    device = _TimedDevice(Emulated(0, 0.0), calibration=calibration, batch=batch)
    return simulate([device] * mode.width, Barrier(), Workload(mode, steps, 1)).mean
