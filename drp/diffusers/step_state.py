"""What is known of a pipeline's step: what its first one showed, and how far the present one is answered."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from drp.diffusers.learned import Learned, RecordedCall
from drp.diffusers.rounds import Predictions


@dataclass(frozen=True)
class TracedStep:
    """What a step showed, and the predictions for those that follow."""

    learned: Learned
    predictions: Predictions


class StepState:
    """A step that is under way: what was recorded of it, or how far it is answered."""

    def __init__(self) -> None:
        self.recorded: list[RecordedCall] = []
        self.position = 0
        """Calls answered."""
        self.mismatch = False
        """It has turned out not to be as the program says: the rest of it is evaluated here."""
        self.in_process = False
        """Something of it was evaluated here."""
        self.x: Tensor | None = None
        """The latents, as the denoiser's arguments show them."""
        self.exact = True
        """They are what the scheduler's last step returned."""
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.answered: dict[tuple[int, int], Tensor] = {}
