"""Measurement: every setting on all seeds, timed alternately with the untouched run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from drp.comparison.distances import measures, relative_l2
from drp.comparison.settings import Drafted, Setting
from drp.comparison.store import UNTOUCHED, Store
from drp.comparison.subject import Sample, Subject, SubjectSession

Progress = Callable[[int, int, str], None]
"""Called with the number of calls made, the number of all calls, and what is being done."""


class Measurement:
    """Measures settings one after another; results that are already in the store are not measured again.

    seeds: the seeds of the samples.
    turns: how many calls of each setting are timed, each followed by an untouched call with the same seed.
    """

    def __init__(self, subject: Subject, store: Store, seeds: Sequence[int], turns: int, progress: Progress) -> None:
        self._subject, self._store, self._seeds, self._turns = subject, store, seeds, turns
        self._progress, self._calls, self._all = progress, 0, 0

    def run(self, settings: Sequence[Setting]) -> None:
        """Measure all settings, and write the results after each."""
        todo = [setting for setting in settings if setting.key not in self._store.results["cells"]]
        each = 1 + max(len(self._seeds), self._turns) + self._turns
        first = UNTOUCHED not in self._store.results
        self._all = len(todo) * each + (len(self._seeds) + 1 if first else 0)
        if not (todo or first):
            return
        with self._subject:
            if first:
                self._measure_untouched(settings[0])
            for setting in todo:
                with self._subject.session(setting) as session:
                    self._store.results["cells"][setting.key] = self._measure(setting, session)
                self._store.write()

    def _measure_untouched(self, setting: Setting) -> None:
        with self._subject.session(setting) as session:
            self._call("untouched", session.untouched, self._seeds[0])
            samples = [self._call("untouched", session.untouched, seed) for seed in self._seeds]
        self._store.save_samples(UNTOUCHED, samples)
        self._store.results[UNTOUCHED] = {
            "label": UNTOUCHED,
            "baseline": self._subject.baseline,
            "steps": samples[0].steps,
            "rounds": [sample.rounds for sample in samples],
            "evaluations": [sample.evaluations for sample in samples],
            "seconds": [sample.seconds for sample in samples],
        }
        self._store.write()

    def _measure(self, setting: Setting, session: SubjectSession) -> dict[str, Any]:
        """Return a setting's figures: a call to warm up, then timed calls in turn with the untouched run.

        The last call is traced if it is not timed, else the first.
        """
        label = setting.label
        trace = self._store.samples(setting.key) / "trace.json" if isinstance(setting, Drafted) else None
        traced = len(self._seeds) - 1 if len(self._seeds) > self._turns else -1
        self._call(label, session.sample, self._seeds[0], trace if traced < 0 else None)
        samples: list[Sample] = []
        seconds, untouched, repeats = [], [], []
        exact = self._store.latents(UNTOUCHED)
        for turn in range(max(len(self._seeds), self._turns)):
            place = turn % len(self._seeds)
            seed = self._seeds[place]
            sample = self._call(label, session.sample, seed, trace if turn == traced else None)
            samples += [sample] if turn < len(self._seeds) else []
            if turn < self._turns:
                again = self._call(label, session.untouched, seed)
                seconds.append(sample.seconds)
                untouched.append(again.seconds)
                repeats += relative_l2(again.latents[None], exact[place : place + 1])
        self._store.save_samples(setting.key, samples)
        return {
            "label": label,
            "kind": "drafted" if isinstance(setting, Drafted) else "fewer steps",
            "options": setting.options if isinstance(setting, Drafted) else {"solver": setting.solver},
            "steps": samples[0].steps,
            "rounds": [sample.rounds for sample in samples],
            "evaluations": [sample.evaluations for sample in samples],
            "seconds": seconds,
            "untouched_seconds": untouched,
            "speedup": statistics.median(untouched) / statistics.median(seconds),
            "untouched_repeats": max(repeats),
            "reason": next((sample.reason for sample in samples if sample.reason), ""),
            "code": self._subject.code(setting),
        }

    def _call(self, label: str, call: Callable[..., Sample], *arguments: Any) -> Sample:
        self._progress(self._calls, self._all, label)
        sample = call(*arguments)
        self._calls += 1
        self._progress(self._calls, self._all, label)
        return sample


def add_distances(store: Store, clip: str | None = None) -> None:
    """Put the distances of all cells' samples from the untouched ones into the results, from the files."""
    if UNTOUCHED not in store.results:
        return
    exact, pictures = store.latents(UNTOUCHED), store.images(UNTOUCHED)
    no_pictures = {"pictures": "the samples are not pictures"}
    able, omitted = measures(pictures[0][0].shape, clip) if pictures else ([], no_pictures)
    store.results["omitted"] = omitted
    store.results["measures"] = {m.name: {"title": m.title, "better": m.better, "summary": m.summary} for m in able}
    for key, cell in store.results["cells"].items():
        distances = relative_l2(store.latents(key), exact)
        cell["distances"] = {
            "relative_l2": {"each": distances, "mean": statistics.fmean(distances), "max": max(distances)}
        }
        images = store.images(key)
        for measure in able:
            each = [
                statistics.fmean([measure.compare(a, b) for a, b in zip(ours, theirs, strict=True)])
                for ours, theirs in zip(images, pictures, strict=True)
            ]
            cell["distances"][measure.name] = {"each": each, measure.summary: measure.summarise(each)}
