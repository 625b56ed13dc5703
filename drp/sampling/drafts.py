"""Draft rules: what is assumed where no prediction is known yet, and what of a prediction is carried elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

from drp.sampling.predictions import PREDICTION_TYPES

CARRIES = {name: 0.5 if name == "epsilon" else 0.25 for name in PREDICTION_TYPES}
"""What measured best, by prediction type (docs/drafts.md)."""


@dataclass(frozen=True)
class DraftRule:
    """The two choices that are open in every round (docs/drafts.md).

    carry: w, from 0 to 1: what of a prediction taken at a draft d holds at the refined state x. The estimate of the
        data there is c_x ((1 - w) x + w d) + c_p prediction, with c_x and c_p of the prediction type: at 0 the
        network's output is carried unchanged, at 1 the data that it implied. None: by prediction type.
    slope: how much of the change of the data estimate, from the base of the block before to the last prediction, is
        assumed to go on, evenly over the indices. At 0 the last estimate stays.
    """

    carry: float | None = None
    slope: float = 1.0

    def carry_of(self, prediction_type: str) -> float:
        """Return w for a network that predicts this."""
        return CARRIES[prediction_type] if self.carry is None else self.carry


PAPER = DraftRule(carry=0.0, slope=0.0)
"""The choices of the paper (DRiffusion, arXiv 2603.25872)."""

SECANT = DraftRule()
"""What measured best, in every mode; the default."""

RULES = {"paper": PAPER, "secant": SECANT}
