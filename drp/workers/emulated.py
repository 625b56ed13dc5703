"""Emulated devices: workers that take a given time for each evaluation, on any machine.

The process, the protocol and the memory are real, so a run on emulated devices measures what drp adds to their time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from drp.protocol.messages import Draft, Emulated
from drp.protocol.waiting import set_timer_slack, sleep_until

STAGGER_SHARE = 0.25
"""Share of the time over which the cheap and the recorded evaluations of a round are spread."""
SLEEP = 0.02
"""Seconds of an evaluation by `sleep`."""


class EvaluationTimes(NamedTuple):
    """When an evaluation began, was computed, was in its row, and was received; seconds of perf_counter."""

    began: float
    predicted: float
    ended: float
    there: float


class EmulatedDevice:
    """Takes the configured time for an evaluation, and for the transfers over its link before and after it."""

    def __init__(self, emulated: Emulated) -> None:
        self.emulated = emulated
        set_timer_slack()

    def run(
        self, draft: Draft, nbytes: int, evaluate: Callable[[], object], since: float | None = None
    ) -> EvaluationTimes:
        """Evaluate a draft of `nbytes` bytes, and sleep until the device's time for it is over.

        With `since`, the earliest time to begin, the evaluation is a queued one: this returns without sleeping, and the
        caller waits for the returned times. It ends later than the device's time only if this process was too slow.
        The transfers over the link are not part of the evaluation.
        """
        link = self.emulated.latency + (nbytes / self.emulated.bandwidth if self.emulated.bandwidth else 0.0)
        if since is not None:
            evaluate()
            began = since + link
            ended = max(began + self.seconds(draft.run, draft.index), time.perf_counter())
            return EvaluationTimes(began, ended, ended, ended + link)
        arrived = time.perf_counter()
        began = sleep_until(arrived + link) if link else arrived
        if self.emulated.values != "model":  # Devices compute side by side; processes that share cores do so in turn.
            sleep_until(began + self.emulated.seconds * STAGGER_SHARE * (self.emulated.number % 16) / 16)
        evaluate()
        ended = sleep_until(began + self.seconds(draft.run, draft.index))
        return EvaluationTimes(began, ended, ended, sleep_until(ended + link) if link else ended)

    def seconds(self, run: int, index: int) -> float:
        """Return the time of an evaluation, which depends only on the device, the run and the index."""
        return seconds_of(self.emulated, run, index)


def seconds_of(e: Emulated, run: int, index: int) -> float:
    """Return the time of a device for an index of a run, in seconds."""
    if not e.jitter and not e.straggler_share:
        return e.seconds
    draws = random.Random(f"{e.number} {run} {index}")  # noqa: S311  # times, not secrets
    straggles = draws.random() < e.straggler_share
    return e.seconds * max(0.0, draws.gauss(1.0, e.jitter)) * (e.straggler_factor if straggles else 1.0)


def cheap(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Return a cheap prediction: x [B, ...] scaled by a factor that depends on t, float32 [B]."""
    return x * (t / 2000.0).view(-1, *[1] * (x.dim() - 1))


def sleep(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Return x after `SLEEP` seconds. The processor's caches are cold then, as after an evaluation on a device."""
    time.sleep(SLEEP)
    return x


def load_sleep() -> Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]:
    """Return `sleep` as a model, `drp.workers.emulated:load_sleep`, by which the network to workers is measured."""
    return sleep


def load() -> Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]:
    """Return `cheap` as a model, `drp.workers.emulated:load`, which `values=cheap` uses in place of the model."""
    return cheap
