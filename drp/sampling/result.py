"""Result: the samples of a run and what it took."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Result:
    """What a run returns.

    `samples` is float32 [B, ...]. `rounds` (evaluations that had to follow one another) and `evaluations` are counted
    by the run. `seconds` is the wall time of the sampling alone, without starting workers. `device_seconds` is the time
    spent in the denoiser, by the evaluating processes' own clocks, over all of them.
    """

    samples: Tensor
    mode: str
    drafts: int
    steps: int
    devices: tuple[str, ...]
    rounds: int
    evaluations: int
    seconds: float
    device_seconds: float

    @property
    def theory(self) -> float:
        """The speed-up over one device that this many rounds allow: evaluations over rounds."""
        return self.evaluations / self.rounds

    @property
    def speedup(self) -> float:
        """The measured one: the evaluations' own time, one after the other, over the wall time."""
        return self.device_seconds / self.seconds
