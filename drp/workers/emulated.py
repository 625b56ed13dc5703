"""Emulated devices: a worker that takes exactly as long as the device it stands in for, on any machine.

Everything else is real: the process, the protocol, the memory. What it measures is what drp adds to the device's time.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Mapping

from torch import Tensor

from drp.protocol.messages import Draft, Emulated

PR_SET_TIMERSLACK = 29
TURNS = 0.25
"""Share of the time over which the cheap and the recorded evaluations of a round are spread."""


class EmulatedDevice:
    """Takes the stated time for an evaluation, and for a link's transfers before and after it."""

    def __init__(self, emulated: Emulated) -> None:
        self.emulated = emulated
        # The kernel may end a sleep 50 us late to save power, unless it is asked not to.
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1)

    def run(self, draft: Draft, nbytes: int, evaluate: Callable[[], object]) -> tuple[float, float, float]:
        """Evaluate a draft of `nbytes`; return when that began, had its prediction and ended, by `perf_counter`.

        Transfers over the link are apart; the prediction is there, and copied, at the end of the stated time.
        """
        link = self.emulated.latency + (nbytes / self.emulated.bandwidth if self.emulated.bandwidth else 0.0)
        arrived = time.perf_counter()
        began = sleep_until(arrived + link) if link else arrived
        if self.emulated.values != "model":  # Devices compute side by side; processes that share cores do so in turn.
            sleep_until(began + self.emulated.seconds * TURNS * (self.emulated.number % 16) / 16)
        evaluate()
        ended = sleep_until(began + self.seconds(draft.run, draft.index))
        if link:
            sleep_until(ended + link)
        return began, ended, ended

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


def sleep_until(deadline: float) -> float:
    """Sleep until `time.perf_counter()` reaches `deadline`; return what it then is."""
    while (left := deadline - time.perf_counter()) > 0:
        time.sleep(left)
    return time.perf_counter()


def cheap(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Predict next to nothing at next to no cost: x [B, ...] shrunk by a share that grows with t float32 [B]."""
    return x * (t / 2000.0).view(-1, *[1] * (x.dim() - 1))


def load() -> Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]:
    """Return `cheap` as a model, `drp.workers.emulated:load`: what `values=cheap` puts in the place of any other."""
    return cheap
