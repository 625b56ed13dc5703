"""Emulated devices: a worker that takes exactly as long as the device it stands in for, on any machine.

Everything else is real: the process, the protocol, the memory. What it measures is what drp adds to the device's time.
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


class EvaluationTimes(NamedTuple):
    """Of an evaluation, in seconds of perf_counter: it began, had its prediction, had it in its row, had sent it."""

    began: float
    predicted: float
    ended: float
    there: float


class EmulatedDevice:
    """Takes the stated time for an evaluation, and for a link's transfers before and after it."""

    def __init__(self, emulated: Emulated) -> None:
        self.emulated = emulated
        set_timer_slack()

    def run(
        self, draft: Draft, nbytes: int, evaluate: Callable[[], object], since: float | None = None
    ) -> EvaluationTimes:
        """Evaluate a draft of `nbytes`, and take the time for it; the prediction is there at the end of that.

        With `since` it is queued: it begins then, and the caller waits, not this. It then ends later than its time is
        over only if this process was too slow for it. Transfers over the link are apart.
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
        """Return the time of one evaluation: the same whenever this device evaluates this index of this run."""
        return seconds_of(self.emulated, run, index)


def seconds_of(e: Emulated, run: int, index: int) -> float:
    """Return the time that a device is to take for an index of a run."""
    if not e.jitter and not e.straggler_share:
        return e.seconds
    draws = random.Random(f"{e.number} {run} {index}")  # noqa: S311  # times, not secrets
    straggles = draws.random() < e.straggler_share
    return e.seconds * max(0.0, draws.gauss(1.0, e.jitter)) * (e.straggler_factor if straggles else 1.0)


def cheap(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Predict next to nothing at next to no cost: x [B, ...] shrunk by a share that grows with t float32 [B]."""
    return x * (t / 2000.0).view(-1, *[1] * (x.dim() - 1))


def load() -> Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]:
    """Return `cheap` as a model, `drp.workers.emulated:load`: what `values=cheap` puts in the place of any other."""
    return cheap
