"""Rounds in flight, and checkpoints, to which a run can return."""

from __future__ import annotations

from dataclasses import dataclass

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
    out: tuple[InFlightRound, ...]
    rounds_done: int
    steps_done: int
    residuals: dict[int, float]
    cuts: tuple[int, ...]
    kept: bool = True


class InFlightRound:
    """A round that is being evaluated.

    slots: by index, the slot of the draft.
    outstanding: the slots whose predictions have not arrived.
    depth: the number of rounds that waited for each other up to this one.
    """

    def __init__(self, slots: dict[int, int], depth: int) -> None:
        self.slots, self.outstanding, self.depth = slots, set(slots.values()), depth

    @property
    def answered(self) -> list[int]:
        """The slots whose predictions have arrived."""
        return [slot for slot in self.slots.values() if slot not in self.outstanding]

    def copy(self) -> InFlightRound:
        """Return a copy of the round's current state."""
        copied = InFlightRound(self.slots, self.depth)
        copied.outstanding = set(self.outstanding)
        return copied
