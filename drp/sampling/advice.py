"""Warnings, once per process, where drafting is not worthwhile. The figures are in docs/drafts.md."""

from __future__ import annotations

import logging

FEW_STEPS = 10
"""Steps below which two drafts gain a quarter at best, and more drafts next to nothing."""
MAX_DRAFTS_WITH_NOISE = 4
"""Drafts per round above which a solver that adds noise is as accurate with fewer sequential steps."""
LEAST_STEPS_A_DRAFT = 3
"""Steps per draft of a round below which fewer sequential steps are nearly as good; below half of it, better."""

_log = logging.getLogger("drp")
_said: set[str] = set()


def doubts(steps: int, drafts: int, adds_noise: bool) -> dict[str, str]:
    """Return the reasons why a run with these steps and drafts per round may not be worthwhile, by kind."""
    found: dict[str, str] = {}
    if drafts < 2:
        return found
    if steps < FEW_STEPS:
        found["few steps"] = (
            f"{steps} steps are too few for drafting: below {FEW_STEPS}, it gains little over fewer sequential steps, "
            "and distilled models are not meant for it; take more steps, which cost no rounds, or mode='sequential'"
        )
    elif drafts * LEAST_STEPS_A_DRAFT > steps:
        found["many drafts"] = (
            f"{drafts} drafts per round are many for {steps} steps: above a third of the steps, fewer sequential steps "
            f"are nearly as good or better; take {steps // LEAST_STEPS_A_DRAFT} drafts or fewer, or more steps"
        )
    if adds_noise and drafts > MAX_DRAFTS_WITH_NOISE:
        found["noise"] = (
            f"the solver adds noise, and a round has {drafts} drafts: above {MAX_DRAFTS_WITH_NOISE}, fewer sequential "
            "steps are as good; take fewer drafts, or a solver without noise"
        )
    return found


def warn(steps: int, drafts: int, adds_noise: bool) -> None:
    """Log doubts as warnings, each kind once in a process."""
    for kind, doubt in doubts(steps, drafts, adds_noise).items():
        if kind not in _said:
            _said.add(kind)
            _log.warning("%s (docs/drafts.md, Where drafting does not pay)", doubt)
