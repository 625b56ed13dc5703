"""Warnings, once per process, where drafting is not worthwhile. The figures are in docs/drafts.md."""

from __future__ import annotations

import logging

FEW_STEPS = 10
"""Steps below which a run, of a distilled model for example, has next to nothing between them to draft."""
MAX_DRAFTS_WITH_NOISE = 4
"""Drafts a round beyond which a solver that adds noise does as well with fewer sequential steps."""
LEAST_STEPS_A_DRAFT = 3
"""Steps for each draft a round below which drafts reach over too much of the run."""

_log = logging.getLogger("drp")
_said: set[str] = set()


def doubts(steps: int, drafts: int, adds_noise: bool) -> dict[str, str]:
    """Return why a run of so many steps with so many drafts a round may not be worth it, by kind; empty if it is."""
    found: dict[str, str] = {}
    if drafts < 2:
        return found
    if steps < FEW_STEPS:
        found["few steps"] = (
            f"{steps} steps are few to draft: below {FEW_STEPS}, fewer sequential steps are as fast and as good; take "
            "more steps, which cost no rounds, or mode='sequential'"
        )
    elif drafts * LEAST_STEPS_A_DRAFT > steps:
        found["many drafts"] = (
            f"{drafts} drafts a round are many for {steps} steps: beyond a third of the steps they are far from the "
            f"states they stand for; take {steps // LEAST_STEPS_A_DRAFT} drafts or fewer, or more steps"
        )
    if adds_noise and drafts > MAX_DRAFTS_WITH_NOISE:
        found["noise"] = (
            f"the solver adds noise, and a round has {drafts} drafts: beyond {MAX_DRAFTS_WITH_NOISE}, fewer sequential "
            "steps are as good; take fewer drafts, or a solver without noise"
        )
    return found


def warn(steps: int, drafts: int, adds_noise: bool) -> None:
    """Log doubts as warnings, each kind once in a process."""
    for kind, doubt in doubts(steps, drafts, adds_noise).items():
        if kind not in _said:
            _said.add(kind)
            _log.warning("%s (docs/drafts.md, Where drafting does not pay)", doubt)
