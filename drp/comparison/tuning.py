"""`drp tune`: measure a few runs, predict all modes and numbers of drafts with the simulator, and try the best."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from drp.comparison.calibration import (
    Calibration,
    Report,
    calibrate,
    call_count,
    largest_drafts,
    simulated_seconds,
    time_batches,
)
from drp.comparison.choose import implausible
from drp.comparison.distances import relative_l2
from drp.comparison.settings import Drafted
from drp.comparison.subject import Sample, Subject

MODES = ("window", "aggressive", "conservative")
"""The modes whose rounds are known before a run; those of the adaptive mode depend on the samples."""
METHOD = (
    "Times are medians of warm calls. The untouched run is {baseline}. The adaptive mode is left out, since its rounds "
    "depend on the samples."
)
LEAST_STEPS = 3
NOTHING = 0.02
"""The share of the time below which further devices gain nothing."""
VARIED = 1.2
"""How many times its shortest time a setting may take before the advice says that times vary."""


@dataclass(frozen=True)
class Candidate:
    """A setting with its predicted time in seconds.

    If it was tried: `measured`, the median time; `speedup`, that of the untouched run in the same turns divided by it;
    `varied`, the longest time divided by the shortest; `distance` to the untouched samples.
    """

    setting: Drafted
    batch: int
    rounds: int
    predicted: float
    measured: float | None = None
    speedup: float | None = None
    varied: float | None = None
    distance: float | None = None

    @property
    def error(self) -> float | None:
        """By how much the prediction exceeds the measured time, as a share of it."""
        return None if self.measured is None else self.predicted / self.measured - 1


@dataclass(frozen=True)
class Tuning:
    """The result: the candidates, the fastest first, and what other numbers of devices would change."""

    calibration: Calibration
    candidates: list[Candidate]
    devices: list[tuple[int, float]]
    """Numbers of devices with the time of the fastest setting of the window on them."""
    best: Candidate
    code: str
    method: list[str]
    """How times and distances were measured, in sentences."""
    advice: list[str]


def tune(subject: Subject, report: Report = lambda _: None) -> Tuning:
    """Measure, predict, try the best setting of each mode, and say what to use and what other devices would change."""
    if subject.steps < LEAST_STEPS:
        raise ValueError(f"steps is {subject.steps}; a round of two drafts needs {LEAST_STEPS} steps or more")
    timed = subject.timed()
    with tempfile.TemporaryDirectory(prefix="drp-tune") as folder, timed:
        trace = Path(folder, "trace.json")
        calibration, exact = calibrate(timed, trace, report)
        calibration = replace(calibration, batches=time_batches(timed, trace, report))
        candidates = _predict(subject, calibration)
        fastest = [min((c for c in candidates if c.setting.mode == mode), key=_time) for mode in MODES]
        tried = [_try(timed, candidate, exact, report) for candidate in fastest]
        method = [METHOD.format(baseline=timed.baseline)]
        if timed is not subject:
            report("computing the samples")
            tried, seconds = _with_reference_distances(timed, tried)
            method += timed.emulation_notes(seconds)
    measured = dict(zip(map(id, fastest), tried, strict=True))
    found = sorted((measured.get(id(c), c) for c in candidates), key=_time)
    best = min(tried, key=lambda c: c.measured or c.predicted)
    counts = sorted({1, 2, *(max(1, len(subject.devices) + more) for more in (-1, 0, 1)), 2 * len(subject.devices)})
    devices = [(count, _window_time(subject, calibration, count)) for count in counts]
    code = subject.batched(best.batch).code(best.setting) if best.batch > 1 else subject.code(best.setting)
    return Tuning(calibration, found, devices, best, code, method, _advice(subject, calibration, devices, best, tried))


def _time(candidate: Candidate) -> float:
    return candidate.predicted


def _predict(subject: Subject, calibration: Calibration) -> list[Candidate]:
    """Return every mode with every number of drafts, alone and in batches, with the predicted time."""
    count, found = len(subject.devices), []
    largest = largest_drafts(subject.steps)
    for batch in (1, *calibration.batches):
        sizes = range(2, max(2, count) + 1) if batch == 1 else (count * batch,)
        settings = [Drafted(mode, n) for mode in MODES for n in sizes if n <= largest]
        for setting in settings:
            rounds = setting.rounds(subject.steps, subject.adds_noise)
            assert rounds is not None
            predicted = calibration.fixed + simulated_seconds(
                setting, subject.steps, calibration, batch, subject.adds_noise
            )
            found.append(Candidate(setting, batch, rounds, predicted))
    return found


def _window_time(subject: Subject, calibration: Calibration, devices: int) -> float:
    """Return the predicted time of the fastest window on this number of devices."""
    settings = [Drafted("sequential", 1)]
    steps, noise = subject.steps, subject.adds_noise
    settings += [Drafted("window", n) for n in range(2, min(devices, largest_drafts(steps)) + 1)]
    return calibration.fixed + min(simulated_seconds(setting, steps, calibration, 1, noise) for setting in settings)


def _try(subject: Subject, candidate: Candidate, exact: Sample, report: Report) -> Candidate:
    """Measure a candidate, on the workers there are or, for batches, on others."""
    report(f"trying {candidate.setting.label}")
    own = subject.batched(candidate.batch) if candidate.batch > 1 else None
    runs, untouched = [], []
    with own or nullcontext(), (own or subject).session(candidate.setting) as session:
        for _ in range(call_count(session.sample(0).seconds)):
            runs.append(session.sample(0))
            untouched.append(session.untouched(0).seconds)
    (apart,) = relative_l2(runs[0].latents[None], exact.latents[None])
    seconds = [run.seconds for run in runs]
    measured = statistics.median(seconds)
    speedup, varied = statistics.median(untouched) / measured, max(seconds) / min(seconds)
    return replace(candidate, measured=measured, speedup=speedup, varied=varied, distance=apart)


def _with_reference_distances(subject: Subject, tried: Sequence[Candidate]) -> tuple[list[Candidate], float]:
    """Return the candidates with the distances of samples of this process, and the seconds of an evaluation in it."""
    exact = subject.reference(None, 0)
    found = []
    for candidate in tried:
        sample = subject.reference(candidate.setting, 0)
        (apart,) = relative_l2(sample.samples[None], exact.samples[None])
        found.append(replace(candidate, distance=apart))
    return found, exact.device_seconds / exact.evaluations


def _advice(
    subject: Subject,
    calibration: Calibration,
    devices: Sequence[tuple[int, float]],
    best: Candidate,
    tried: Sequence[Candidate],
) -> list[str]:
    """Return what to do, in sentences."""
    gain = best.speedup or calibration.untouched / best.predicted
    lines = [
        f"The fastest that was tried is {best.setting.label}: {gain:.2f} times as fast as the untouched run, at a "
        f"relative L2 distance of {best.distance:.4f}."
    ]
    if gain < 1:
        lines = [
            f"Drafting gains nothing: {best.setting.label} takes {1 / gain:.2f} times as long as the untouched run."
        ]
    if why := implausible(gain, subject.steps, best.rounds):
        lines.append(why)
    times, count = dict(devices), len(subject.devices)
    for other in (count - 1, count + 1, 2 * count):
        if other in times and other != count:
            change = 1 - times[other] / times[count]
            name = f"With {other} device{'s' if other > 1 else ''} such as these, the window"
            if change > NOTHING:
                lines.append(f"{name} would take {change:.0%} less time.")
            elif change < -NOTHING:
                lines.append(f"{name} would take {-change:.0%} more time.")
            else:
                lines.append(
                    f"{name} would take the same time: {'more' if other > count else 'as many'} devices gain nothing."
                )
    single, together = calibration.rounds[1].slowest, calibration.rounds[max(calibration.rounds)].slowest
    if together > 1.1 * single:
        lines.append(
            f"An evaluation takes {together / single:.2f} times as long while all devices evaluate, which share "
            "cores or memory."
        )
    for size in calibration.batches:
        ratio = calibration.batch_ratio(size)
        worth = "one device can evaluate several drafts" if ratio < 0.8 * size else "batches gain little"
        lines.append(f"A batch of {size} drafts takes {ratio:.2f} times as long as one draft: {worth}.")
    varied = max(c.varied or 1.0 for c in tried)
    if varied > VARIED:
        lines.append(
            f"Calls of one setting took up to {varied:.2f} times as long as its fastest call: other programs ran, or "
            "the clock rate changed. Run this again on a quiet machine."
        )
    return lines
