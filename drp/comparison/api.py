"""`drp.compare`, and the code that it shares with `drp.diffusers.compare`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drp.api import divide_arguments
from drp.comparison.choose import Recommendation
from drp.comparison.measure import Measurement, Progress, add_distances
from drp.comparison.models import ModelSubject
from drp.comparison.report import notes, table, write_reports
from drp.comparison.settings import Setting, default_drafts, expand, fewer_steps
from drp.comparison.store import Store
from drp.comparison.subject import Subject
from drp.processor import processor_name
from drp.version import find_version

MODES = ("window", "aggressive", "conservative", "adaptive")
"""The modes that are compared if none are named."""


@dataclass(frozen=True)
class Comparison:
    """A finished comparison.

    cells: the figures of each setting by its key, as in results.json.
    choice: the recommended setting, with the code that samples so.
    report: the page.
    table: the report's table, the titles of its columns first.
    notes: what to know besides the figures.
    """

    cells: Mapping[str, Mapping[str, Any]]
    choice: Recommendation
    report: Path
    table: Sequence[Sequence[str]]
    notes: Sequence[str]


def compare(
    model: str | Callable[[], Any] = "digits",
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
    progress: Progress | None = None,
    **arguments: Any,
) -> Comparison:
    """Measure modes and numbers of drafts on a model against the untouched sequential run, and write a report.

    model, devices: as for `drp.Leader`.
    modes, drafts, strides, tolerances, rule: the settings, every mode with every number of drafts. `strides` apply to
        mode window, `tolerances` to mode adaptive. By default `drafts` are the powers of 2 up to the number that the
        devices evaluate at once.
    rivals: also measure as many sequential steps as the settings have rounds, of the same solver and of UniPC.
    seeds: the number of seeds, or a list of seeds, with one sample each.
    turns: the number of timed calls of each setting, which alternate with those of the untouched run.
    max_distance, min_speedup: bounds for the recommendation, on the mean relative L2 distance and the speed-up.
    clip: a folder or a hub's name of a CLIP model in the local cache.
    out: the folder for report.html, report.md, results.json and the samples. Existing results of the same
        settings are not measured again.
    force: replace the contents of `out`.
    progress: called with calls made, all calls, and the setting.
    arguments: those of `drp.sample`, such as the leader's threads and drafts_per_device and the run's steps, guidance,
        labels, shape and so on.

    If interrupted, it writes the report of the settings measured so far and raises KeyboardInterrupt again. Raises
    ValueError for invalid arguments, before any work.
    """
    leader, options = divide_arguments({"devices": devices, **arguments})
    subject = ModelSubject(model, leader, **options)
    settings = plan(subject, modes, drafts, strides, tolerances, rule, rivals)
    return run(subject, settings, seeds, turns, max_distance, min_speedup, clip, out, force, progress)


def plan(
    subject: Subject,
    modes: Sequence[str],
    drafts: Sequence[int] | None,
    strides: Sequence[float],
    tolerances: Sequence[float],
    rule: str | None,
    rivals: bool,
) -> list[Setting]:
    """Return the settings to measure, each checked."""
    tried = default_drafts(subject.capacity) if drafts is None else tuple(drafts)
    steps, noise = subject.steps, subject.adds_noise
    drafted = expand(modes, tried, strides, tolerances, rule, steps, noise)
    settings: list[Setting] = [*drafted, *(fewer_steps(drafted, steps, noise) if rivals else ())]
    for setting in settings:
        subject.check(setting)
    return settings


def run(
    subject: Subject,
    settings: Sequence[Setting],
    seeds: int | Sequence[int],
    turns: int,
    max_distance: float | None,
    min_speedup: float | None,
    clip: str | None,
    out: str | os.PathLike[str],
    force: bool,
    progress: Progress | None,
) -> Comparison:
    """Measure the settings and write the reports, also if it is interrupted."""
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or turns < 1:
        raise ValueError(f"seeds is {seeds!r} and turns {turns}; give 1 or more of each")
    for name, bound in (("max_distance", max_distance), ("min_speedup", min_speedup)):
        if bound is not None and not bound > 0:
            raise ValueError(f"{name} is {bound}; give a number above 0")
    store = Store(Path(out), {**subject.facts, "seeds": numbers}, force)
    store.results["machine"] = machine()
    try:
        Measurement(subject, store, numbers, turns, progress or (lambda *_: None)).run(settings)
    finally:
        add_distances(store, clip)
        choice = write_reports(store, numbers, len(settings), max_distance, min_speedup)
    return Comparison(store.results["cells"], choice, store.folder / "report.html", table(store), notes(store))


def machine() -> dict[str, Any]:
    """Return what times depend on."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "torch": torch.__version__,
        "drp": find_version(),
    }
