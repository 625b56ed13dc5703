"""The state of a call's steps: the traced step, and the progress of the current one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from drp.diffusers.learned import Learned, RecordedCall
from drp.diffusers.rounds import Predictions


@dataclass(frozen=True)
class TracedStep:
    """The traced step, and the predictions for the steps after it."""

    learned: Learned
    predictions: Predictions


class StepState:
    """The current step: its recorded calls, or the number of answered calls."""

    def __init__(self) -> None:
        self.recorded: list[RecordedCall] = []
        self.position = 0
        """The number of answered calls."""
        self.mismatch = False
        """Whether the step differs from the program, so that the rest of it is evaluated in this process."""
        self.in_process = False
        """Whether a call was evaluated in this process."""
        self.x: Tensor | None = None
        """The latents in the denoiser's arguments."""
        self.exact = True
        """Whether the latents are the result of the scheduler's last step."""
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.answered: dict[tuple[int, int], Tensor] = {}
