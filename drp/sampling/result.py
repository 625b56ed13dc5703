"""Result: the samples of a run and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeVar

    Samples = TypeVar("Samples", default=Tensor)
else:  # A client on a machine without torch has results too.
    from typing import TypeVar

    Samples = TypeVar("Samples")


@dataclass(frozen=True)
class Result(Generic[Samples]):
    """What a run returns.

    `samples` is float32 [B, ...], a torch tensor, or, of a client that was told so, a numpy array.

    `rounds` (evaluations that had to follow one another) and `evaluations` are counted by the run. `seconds` is the
    wall time of the sampling alone, without starting workers. `device_seconds` is the time spent in the denoiser, by
    the evaluating processes' own clocks, over all of them.

    `residuals` say, by index of the grid, how far from the refined state its prediction was taken, relative to that
    state's norm, the largest among the samples; empty unless the mode is adaptive or they were asked for. `cuts` are
    the indices to which an adaptive run advanced though it had predictions beyond: where drafts went stale.
    `evaluated` says how often each index was evaluated: more than once in sweeps, in adaptive and window modes, where a
    later prediction takes the place of an earlier one, and not at all where a window's offsets leave it out.

    `dispatch` is "sync" or "async": whether workers were sent drafts ahead, see `drp.ExecutionOptions`; None where that
    is not known: without workers, and at a client.

    `incidents` say which workers were lost meanwhile, and how. Others took over; the samples are the same.
    """

    samples: Samples
    mode: str
    drafts: int
    steps: int
    devices: tuple[str, ...]
    rounds: int
    evaluations: int
    seconds: float
    device_seconds: float
    residuals: Mapping[int, float] = field(default_factory=dict)
    cuts: tuple[int, ...] = ()
    evaluated: tuple[int, ...] = ()
    incidents: tuple[str, ...] = ()
    dispatch: str | None = None

    @property
    def theory(self) -> float:
        """The speed-up over one device, which takes a round a step, that this many rounds allow."""
        return self.steps / self.rounds

    @property
    def speedup(self) -> float:
        """The measured one: an evaluation's own time, once for each step, over the wall time.

        Adaptive runs and sweeps evaluate some steps more than once, which one device would not. It is 0 where devices
        report no times: GPUs with asynchronous dispatch.
        """
        return self.device_seconds / self.evaluations * self.steps / self.seconds
