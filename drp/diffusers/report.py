"""Report: what `parallelize` did in each call of a pipeline."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class CallReport:
    """One call of the pipeline.

    `steps`, `rounds` (evaluations that had to follow one another) and `evaluations` (of all the step's modules
    together) are counted. `seconds` is the wall time from the first evaluation to the last step, `device_seconds` the
    time spent in evaluations by the evaluating processes' clocks. `sequential` says why steps were taken without drafts
    though the mode has them, `notes` what else is worth knowing, each with how often, and `reason` why nothing was
    gained, if nothing was.
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
    residuals: dict[int, float] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Why no round had more than one step, though the mode has drafts; nothing if some had."""
        if self.sequential or self.drafts < 2 or self.rounds < self.steps:
            return self.sequential
        if self.steps == 0:
            return "no step of the pipeline's scheduler has followed the denoiser's calls" if self.evaluations else ""
        if self.steps <= 2:
            return "there are too few steps: the first two are taken one by one"
        if self.notes:
            return "no draft was of use: " + "; ".join(self.notes)
        return "no round of the mode has had more than one step"

    @property
    def theory(self) -> float:
        """The speed-up over one device, which takes a round a step, that this many rounds allow."""
        return self.steps / self.rounds if self.rounds else 1.0

    @property
    def speedup(self) -> float:
        """The measured one: an evaluation's own time, once for each step, over the wall time."""
        if not (self.evaluations and self.seconds):
            return 1.0
        return self.device_seconds / self.evaluations * self.steps / self.seconds

    def __str__(self) -> str:
        line = (
            f"{self.mode}, {self.drafts} draft(s) a round on {', '.join(self.devices)}: {self.steps} steps in "
            f"{self.rounds} rounds, {self.evaluations} evaluations, {self.seconds:.2f} s; speed-up "
            f"{self.speedup:.2f} of {self.theory:.2f} in theory"
        )
        if self.reason:
            line += f"\n  without drafts: {self.reason}"
        return line + "".join(f"\n  {note}" + (f" ({n} times)" if n > 1 else "") for note, n in self.notes.items())


@dataclass
class Report:
    """Every call of the pipeline inside the `with`, in order."""

    calls: list[CallReport] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(map(str, self.calls)) or "the pipeline was not called"
