"""Draft rules: what is assumed where no prediction is known yet, and what of a prediction is carried elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DraftRule:
    """The two choices that are open in every round (docs/drafts.md).

    carry: w, from 0 to 1: what of a prediction taken at a draft d holds at the refined state x. The estimate of the
        data there is c_x ((1 - w) x + w d) + c_p prediction, with c_x and c_p of the prediction type: at 0 the
        network's output is carried unchanged, at 1 the data that it implied.
    slope: how much of the change of the data estimate, from the base of the block before to the last prediction, is
        assumed to go on, evenly over the indices. At 0 the last estimate stays.

    `DraftRule()` are the choices of the paper (DRiffusion, arXiv 2603.25872).
    """

    carry: float = 0.0
    slope: float = 0.0


PAPER = DraftRule()
SECANT = DraftRule(carry=0.5, slope=1.0)
RULES = {"paper": PAPER, "secant": SECANT}

BEST = SECANT
"""The rule that measured best, in every mode (docs/drafts.md)."""
