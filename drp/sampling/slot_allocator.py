"""An allocator of groups of rows of a matrix, which are reused once no row in them is in use."""

from __future__ import annotations

from collections.abc import Iterable

from drp.sampling.modes import Mode
from drp.sampling.plan import max_rounds_in_use
from drp.sampling.solvers import Solver

ROUNDS_BACK = 4
"""Rounds for which memory is reserved so that a run can return to a checkpoint."""


class SlotAllocator:
    """`count` groups of `width` rows each, one after the other."""

    def __init__(self, count: int, width: int) -> None:
        self.count, self.width = count, width

    @property
    def rows(self) -> int:
        return self.count * self.width

    def find(self, rows: int, used: Iterable[int]) -> int | None:
        """Return the first of `rows` consecutive rows in groups without a row of `used`; None if there are none."""
        busy = {row // self.width for row in used}
        wanted = 1 if self.width > 1 else rows  # groups of a single row are taken several in a row
        run = 0
        for bank in range(self.count):
            run = 0 if bank in busy else run + 1
            if run == wanted:
                return (bank + 1 - wanted) * self.width if rows <= self.width * wanted else None
        return None

    def error(self, rows: int, used: Iterable[int]) -> ValueError:
        """Return the error for rows that were not found: a user's mode keeps predictions longer than was reserved."""
        busy = len({row // self.width for row in used})
        return ValueError(
            f"the mode needs {rows} rows beside those of {busy} rounds, and there are {self.count} groups of "
            f"{self.width}; its rounds must advance sooner, or its width be larger"
        )


def slots(solver: Solver, mode: Mode, checkpoints: bool = False) -> int:
    """Return the number of slots that a run needs for drafts; it needs as many rows for predictions.

    With `checkpoints`, this includes the slots that two checkpoints within the last few rounds keep in use.
    """
    return make_allocator(solver, mode, mode.width, checkpoints).rows


def _rounds_kept(solver: Solver, mode: Mode) -> int:
    """Return the maximum number of rounds that are in use at once.

    These are the round being evaluated, the round being refined and the round of its base; the round that the draft
    rule looks back on; and one round for each earlier index that the solver uses.
    """
    usual = 3 + mode.rule.looks_back + solver.history
    return max(usual, 1 + max_rounds_in_use(mode, solver.grid.steps, solver.history)) if mode.gaps else usual


def make_allocator(solver: Solver, mode: Mode, width: int, checkpoints: bool) -> SlotAllocator:
    """Return an allocator for the slots in use at once; in a pipelined mode, rounds may have any length."""
    kept = _rounds_kept(solver, mode)
    more = ROUNDS_BACK if checkpoints else 0
    return SlotAllocator((2 * kept + more) * width, 1) if mode.pipelined else SlotAllocator(kept + more, width)
