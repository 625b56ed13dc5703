"""Reports of the calls of a parallelized pipeline."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class CallReport:
    """The report of one call.

    steps: the number of steps.
    rounds: the number of rounds: evaluations that follow one another.
    evaluations: the number of evaluations, each of all calls of a step.
    seconds: the wall time from the first evaluation to the last step.
    device_seconds: the time of all evaluations by the clocks of the evaluating processes. Once a call has turned
        sequential, evaluations on a GPU are not waited for, and only the time to queue them counts.
    sequential: why steps were taken without drafts although the mode has them, empty if none were.
    notes: further remarks, with their counts.
    doubts: why drafting may not be worthwhile with so many steps and drafts.
    """

    mode: str
    drafts: int
    devices: tuple[str, ...]
    steps: int = 0
    rounds: int = 0
    evaluations: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0
    sequential: str = ""
    notes: Counter[str] = field(default_factory=Counter)
    doubts: tuple[str, ...] = ()
    residuals: dict[int, float] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Why no round had more than one step although the mode has drafts, empty if some had."""
        if self.sequential or self.drafts < 2 or self.rounds < self.steps:
            return self.sequential
        if self.steps == 0:
            return "no step of the pipeline's scheduler followed the calls of the denoiser" if self.evaluations else ""
        if self.steps <= 2:
            return "there are too few steps: the first two are always sequential"
        if self.notes:
            return "no draft could be used: " + "; ".join(self.notes)
        return "no round of the mode has had more than one step"

    @property
    def theory(self) -> float:
        """The maximum speed-up over one device with this number of rounds: steps / rounds."""
        return self.steps / self.rounds if self.rounds else 1.0

    @property
    def speedup(self) -> float:
        """The measured speed-up: the mean time of an evaluation times the steps, divided by the wall time."""
        if not (self.evaluations and self.seconds):
            return 1.0
        return self.device_seconds / self.evaluations * self.steps / self.seconds

    def __str__(self) -> str:
        line = (
            f"{self.mode}, {self.drafts} draft(s) per round on {', '.join(self.devices)}: {self.steps} steps in "
            f"{self.rounds} rounds, {self.evaluations} evaluations, {self.seconds:.2f} s"
        )
        if self.reason:
            line += f"\n  without drafts: {self.reason}"
        else:
            line += f"; speed-up {self.speedup:.2f} of {self.theory:.2f} in theory"
        line += "".join(f"\n  {doubt}" for doubt in self.doubts)
        return line + "".join(f"\n  {note}" + (f" ({n} times)" if n > 1 else "") for note, n in self.notes.items())


@dataclass
class Report:
    """The reports of all calls, in order."""

    calls: list[CallReport] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls)) or "the pipeline was not called"
