"""`drp tune`: measure a few runs, predict all modes and numbers of drafts with the simulator, and try the best."""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from drp.comparison.distances import relative_l2
from drp.comparison.settings import Drafted
from drp.comparison.subject import Sample, Subject
from drp.leader.scheduling.policies import Barrier
from drp.protocol.messages import Emulated
from drp.simulate import Costs, Device, Load, simulate
from drp.simulate.costs import LinearCost
from drp.trace import read
from drp.trace.evaluations import evaluations

MODES = ("window", "aggressive", "conservative")
"""The modes whose rounds are known before a run; those of the adaptive mode depend on the samples."""
BATCHES = (2, 4)
CALIBRATION_RUNS, TRIED_RUNS = 3, 3
NOTHING = 0.02
"""The share of the time below which further devices gain nothing."""

Report = Callable[[str], None]
"""Called with what is being done."""


@dataclass(frozen=True)
class Calibration:
    """What was measured on the devices; times in seconds.

    rounds: the slowest evaluation of a round, by the number of drafts that are evaluated at once, one a device.
    batches: a batch of drafts on one device, by its size.
    loss: what a round of n drafts takes besides the slowest evaluation, linear in n.
    fixed: what a call takes before the first evaluation and after the last step.
    memory: bytes, by the name of each device.
    untouched: a call without drp.
    """

    rounds: dict[int, float]
    batches: dict[int, float]
    loss: LinearCost
    fixed: float
    memory: dict[str, int]
    untouched: float

    def seconds(self, width: int) -> float:
        """Return the time of a round of so many drafts, on the line through the nearest two that were measured."""
        known = sorted(self.rounds)
        low = max((w for w in known[:-1] if w <= width), default=known[0])
        high = next((w for w in known if w > low), low)
        slope = (self.rounds[high] - self.rounds[low]) / (high - low) if high > low else 0.0
        return self.rounds[low] + slope * (width - low)


@dataclass(frozen=True)
class _TimedDevice(Device):
    """A device whose evaluations take as long as those of a round with as many drafts."""

    times: Mapping[int, float] = field(default_factory=dict)

    def seconds(self, run: int, step: int, draws: random.Random) -> float:
        return self.times[step]


@dataclass(frozen=True)
class Candidate:
    """A setting with its predicted time in seconds; `measured` and `distance` if it was tried."""

    setting: Drafted
    batch: int
    rounds: int
    predicted: float
    measured: float | None = None
    distance: float | None = None


@dataclass(frozen=True)
class Tuning:
    """The result: the candidates, the fastest first, and what other numbers of devices would change."""

    calibration: Calibration
    candidates: list[Candidate]
    devices: list[tuple[int, float]]
    """Numbers of devices with the time of the fastest setting of the window on them."""
    best: Candidate
    code: str
    advice: list[str]


def tune(subject: Subject, report: Report = lambda _: None) -> Tuning:
    """Measure, predict, try the best setting of each mode, and say what to use and what other devices would change."""
    with tempfile.TemporaryDirectory(prefix="drp-tune") as folder:
        trace = Path(folder, "trace.json")
        with subject:
            calibration, exact = _calibrate(subject, trace, report)
            calibration = replace(calibration, batches=_time_batches(subject, trace, report))
            candidates = _predict(subject, calibration)
            tried = [min((c for c in candidates if c.setting.mode == mode), key=_time) for mode in MODES]
            measured = {id(c): _try(subject, c, exact, report) for c in tried}
    found = sorted((measured.get(id(c), c) for c in candidates), key=_time)
    best = min(measured.values(), key=lambda c: c.measured or c.predicted)
    counts = sorted({1, 2, *(max(1, len(subject.devices) + more) for more in (-1, 0, 1)), 2 * len(subject.devices)})
    devices = [(count, _window_time(subject.steps, calibration, count)) for count in counts]
    code = subject.batched(best.batch).code(best.setting) if best.batch > 1 else subject.code(best.setting)
    return Tuning(calibration, found, devices, best, code, _advice(subject, calibration, devices, best))


def _time(candidate: Candidate) -> float:
    return candidate.predicted


def _calibrate(subject: Subject, trace: Path, report: Report) -> tuple[Calibration, Sample]:
    """Measure runs that use one device, half of the devices, and all of them."""
    count = max(2, len(subject.devices))
    widths = sorted({1, max(2, count // 2), count})
    runs: dict[int, list[Sample]] = {}
    rounds: dict[int, float] = {}
    untouched: list[float] = []
    for width in widths:
        report(f"measuring rounds of {width}")
        with subject.session(_of_width(width)) as session:
            session.sample(0)
            traces = []
            for _ in range(CALIBRATION_RUNS):
                runs.setdefault(width, []).append(session.sample(0, trace))
                traces.append(round_seconds(trace, width))
                exact = session.untouched(0)
                untouched.append(exact.seconds)
        rounds[width] = statistics.median(traces)
    measured = Calibration(rounds, {}, LinearCost(), 0.0, {}, statistics.median(untouched))
    points = []
    for width, samples in runs.items():
        seconds = statistics.median(sample.sampling_seconds for sample in samples)
        alone = _simulated(_of_width(width), subject.steps, measured, 1)
        points.append((width, max(0.0, (seconds - alone) / samples[0].rounds)))
    fixed = statistics.median(s.seconds - s.sampling_seconds for samples in runs.values() for s in samples)
    return replace(measured, loss=LinearCost.fit(points), fixed=fixed, memory=subject.memory()), exact


def _of_width(width: int) -> Drafted:
    return Drafted("sequential", 1) if width == 1 else Drafted("aggressive", width)


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


def _time_batches(subject: Subject, trace: Path, report: Report) -> dict[int, float]:
    """Return the times of batches on one device, where devices evaluate batches."""
    found = {}
    for size in BATCHES if subject.can_batch else ():
        report(f"measuring batches of {size}")
        alone = subject.batched(size, one_device=True)
        with alone, alone.session(Drafted("aggressive", size)) as session:
            session.sample(0)
            session.sample(0, trace)
            found[size] = round_seconds(trace, size)
    return found


def _simulated(setting: Drafted, steps: int, calibration: Calibration, batch: int) -> float:
    """Return the simulated time of a run with a device for each draft, and the calibration's losses.

    An index that rounds of different widths draft, as the last ones of a window do, always has the time of the latest.
    """
    mode = setting.make_mode()
    share = calibration.batches[batch] / calibration.rounds[1] if batch > 1 else 1.0
    times: dict[int, float] = {}
    for r in mode.rounds(steps):
        width = -(-len(r.predict) // batch)
        times |= dict.fromkeys(r.predict, calibration.seconds(width) * (share if len(r.predict) > 1 else 1.0))
    first = calibration.loss.fixed + calibration.loss.each
    costs = Costs(start=(first,), form=replace(calibration.loss, apart=(0.0,)))
    device = _TimedDevice(Emulated(0, 0.0), times=times)
    return simulate([device] * mode.width, Barrier(), Load(mode, steps, 1), costs).mean


def _predict(subject: Subject, calibration: Calibration) -> list[Candidate]:
    """Return every mode with every number of drafts, alone and in batches, with the predicted time."""
    count, found = len(subject.devices), []
    largest = max(2, subject.steps // 3)
    for batch in (1, *calibration.batches):
        sizes = range(2, max(2, count) + 1) if batch == 1 else (count * batch,)
        settings = [Drafted(mode, n) for mode in MODES for n in sizes if n <= largest]
        for setting in settings:
            rounds = setting.rounds(subject.steps)
            assert rounds is not None
            predicted = calibration.fixed + _simulated(setting, subject.steps, calibration, batch)
            found.append(Candidate(setting, batch, rounds, predicted))
    return found


def _window_time(steps: int, calibration: Calibration, devices: int) -> float:
    """Return the predicted time of the fastest window on so many devices."""
    settings = [Drafted("sequential", 1)]
    settings += [Drafted("window", n) for n in range(2, min(devices, max(2, steps // 3)) + 1)]
    return calibration.fixed + min(_simulated(setting, steps, calibration, 1) for setting in settings)


def _try(subject: Subject, candidate: Candidate, exact: Sample, report: Report) -> Candidate:
    """Measure a candidate, on the workers there are or, for batches, on others."""
    report(f"trying {candidate.setting.label}")
    own = subject.batched(candidate.batch) if candidate.batch > 1 else None
    with own or nullcontext(), (own or subject).session(candidate.setting) as session:
        session.sample(0)
        runs = [session.sample(0) for _ in range(TRIED_RUNS)]
    (apart,) = relative_l2(runs[0].latents[None], exact.latents[None])
    return replace(candidate, measured=statistics.median(run.seconds for run in runs), distance=apart)


def _advice(
    subject: Subject, calibration: Calibration, devices: Sequence[tuple[int, float]], best: Candidate
) -> list[str]:
    """Return what to do, in sentences."""
    measured = best.measured or best.predicted
    gain = calibration.untouched / measured
    lines = [f"The fastest that was tried is {best.setting.label}: {gain:.2f} times as fast as the untouched run."]
    if gain < 1:
        lines = [
            f"Drafting gains nothing: {best.setting.label} takes {1 / gain:.2f} times as long as the untouched run."
        ]
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
    single, together = calibration.rounds[1], calibration.rounds[max(calibration.rounds)]
    if together > 1.1 * single:
        lines.append(
            f"An evaluation takes {together / single:.2f} times as long while all devices evaluate, which share "
            "cores or memory."
        )
    for size, seconds in calibration.batches.items():
        ratio = seconds / single
        worth = "one device can evaluate several drafts" if ratio < 0.8 * size else "batches gain little"
        lines.append(f"A batch of {size} drafts takes {ratio:.2f} times as long as one draft: {worth}.")
    return lines
