"""Rounds in flight, and checkpoints, to which a run can return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from drp.sampling.cached_plan import PlannedAdvance


@dataclass(eq=False)
class Checkpoint:
    """The state of a run just after it has scheduled the drafts of a round, for `Run.restore`.

    Nothing is copied: while the run keeps the checkpoint, the rows that it refers to are not reused. `kept` is False
    once the checkpoint was dropped.
    """

    position: int
    slots: dict[int, int]
    answers: dict[int, int]
    rows: dict[int, int]
    ahead: tuple[int, list[float]]
    to_refine: tuple[tuple[PlannedAdvance, int], ...]
    in_flight: tuple[InFlightRound, ...]
    outstanding: frozenset[int]
    rounds_done: int
    steps_done: int
    residuals: dict[int, float]
    cuts: tuple[int, ...]
    kept: bool = True


class InFlightRound(NamedTuple):
    """A round that is being evaluated.

    slots: by index, the slot of the draft.
    depth: the number of rounds that waited for each other up to this one.
    """

    slots: dict[int, int]
    depth: int
