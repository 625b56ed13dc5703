"""Draft rules: what is assumed where no prediction is known yet, and what of a prediction is carried elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DraftRule:
    """The two choices that are open in every round (docs/drafts.md).

    carry: w, from 0 to 1: what of a prediction taken at a draft d holds at the refined state x. The estimate of the
        data there is c_x ((1 - w) x + w d) + c_p prediction, with c_x and c_p of the prediction type: at 0 the
        network's output is carried unchanged, at 1 the data that it implied.
    slope: how much of the change between the last prediction and the one at the base of the block before is assumed to
        go on, linearly in lambda. At 0 the last estimate of the data stays.

    The defaults are the choices of the paper (DRiffusion, arXiv 2603.25872).
    """

    carry: float = 0.0
    slope: float = 0.0


PAPER = DraftRule()
RULES = {"paper": PAPER, "secant": DraftRule(carry=0.5, slope=0.5)}


def best_rule(mode: str) -> DraftRule:
    """Return the rule that measured best in a mode (docs/drafts.md)."""
    return PAPER if mode == "adaptive" else RULES["secant"]
