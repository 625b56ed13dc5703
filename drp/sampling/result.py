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

    samples: float32 [B, ...], a torch tensor; a numpy array from a client with `arrays="numpy"`.
    mode: the mode's name.
    drafts: the maximum number of drafts per round.
    steps: the number of solver steps.
    devices: the names of the workers' devices.
    rounds: the number of evaluations that had to follow one another.
    evaluations: the number of all evaluations.
    seconds: the wall time of the sampling, without starting workers.
    device_seconds: the time spent in the denoiser, by the workers' clocks, summed over all workers; 0 if unknown. With
        asynchronous dispatch to GPUs it is extrapolated from the evaluations whose times were known before the end.
    residuals: by index, the distance between the refined state and the input of its prediction, relative to the state's
        norm, the maximum over the samples; empty unless the mode is adaptive or `residuals` were requested.
    cuts: the indices at which an adaptive run stopped advancing although it had predictions beyond.
    evaluated: how many times each index was evaluated: several times in sweeps, windows and the adaptive mode, where a
        later prediction replaces an earlier one, and not at all where a window's offsets leave it out.
    incidents: the workers lost during the run, and how. The samples are the same, since other workers took over.
    dispatch: "sync" or "async", see `drp.ExecutionOptions`; None without workers, and at a client.
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
        """The speed-up that the number of rounds allows over one device, which takes one round per step."""
        return self.steps / self.rounds

    @property
    def speedup(self) -> float:
        """The measured speed-up: the mean time of an evaluation, times the number of steps, over the wall time.

        It is 0 if no times are known, as in a very short run with asynchronous dispatch to GPUs.
        """
        return self.device_seconds / self.evaluations * self.steps / self.seconds
