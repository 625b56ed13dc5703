"""Run: the arithmetic of one sampling run, without processes: it forms drafts, takes predictions, refines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drp.sampling.grids import Grid
from drp.sampling.modes import Mode
from drp.sampling.plan import Block, make_plan
from drp.sampling.rows import Row, Term, prediction, state
from drp.sampling.solvers import Solver

BANKS = 3
"""Rounds whose slots are in use at once: the one being evaluated, the one being refined, and its base's."""

Callback = Callable[[int, Tensor], None]
"""Called with the number of steps done, 1..N in order, and that state [B, ...]: a view, valid during the call."""


@dataclass(frozen=True)
class Task:
    """One evaluation: the draft in `slot`, at `timestep`; the prediction is written to the same slot's number."""

    index: int
    timestep: float
    slot: int


class Run:
    """One run: `rounds()` yields the tasks of each round, `refine()` computes the states behind it.

    `drafts` and `predictions` are matrices [BANKS * mode.width, D] of the state's dtype, one slot a row, D the numbers
    in one state. Tasks name their rows. Whoever evaluates reads a draft's row and writes the same row of `predictions`.
    """

    def __init__(self, solver: Solver, mode: Mode, noise: Tensor, drafts: Tensor, predictions: Tensor) -> None:
        self._grid: Grid = solver.grid
        self._width = mode.width
        self._plan = [_Step(block, noise.dtype) for block in make_plan(solver, mode)]
        self._shape = noise.shape
        self._drafts = drafts
        self._predictions = predictions
        self._known: dict[Term, Tensor] = {state(0): noise.reshape(-1)}
        # Two buffers in turn: a block's states are computed from its base, which lies in the other one.
        longest = max((len(step.block.refined) for step in self._plan), default=0)
        self._states, self._spare = (noise.new_empty((longest, noise.numel())) for _ in range(2))
        self._to_refine: _Step | None = None
        self.rounds_done = 0
        self.steps_done = 0

    @property
    def state(self) -> Tensor:
        """The latest refined state [B, ...]; after the run, the samples."""
        return self._known[state(self.steps_done)].view(self._shape)

    def rounds(self) -> Iterator[list[Task]]:
        """Yield each round's tasks, their drafts written; ask for the next once every prediction is in its slot.

        Call `refine` once between two rounds, best while the new tasks are being evaluated, and once at the end.
        """
        for number, step in enumerate(self._plan):
            r = step.block.round
            first = number % BANKS * self._width
            slots = range(first, first + len(r.predict))
            step.drafts.write(self._known, self._drafts[slots.start : slots.stop])
            yield [Task(k, float(self._grid.timesteps[k]), slot) for k, slot in zip(r.predict, slots, strict=True)]
            self._known.update({prediction(k): self._predictions[i] for k, i in zip(r.predict, slots, strict=True)})
            self.rounds_done += 1
            if r.advance > r.base:
                self._states, self._spare = self._spare, self._states
                last = r.advance - r.base - 1
                step.advance.write(self._known, self._states[last : last + 1])
                self._known[state(r.advance)] = self._states[last]
                self._to_refine = step

    def refine(self, callback: Callback | None = None) -> None:
        """Compute the states that the last finished round has passed; call `callback` for each, in order."""
        if self._to_refine is None:
            return
        step, self._to_refine = self._to_refine, None
        r = step.block.round
        step.between.write(self._known, self._states[: r.advance - r.base - 1])
        for k, x in enumerate(self._states[: r.advance - r.base], start=r.base + 1):
            self.steps_done = k
            if callback is not None:
                callback(k, x.view(self._shape))
        for term in [t for t in self._known if t.k < r.advance]:
            del self._known[term]


class _Step:
    """A block with its rows in the state's dtype."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        self.block = block
        self.drafts = _Rows(block.drafts, dtype)
        self.advance = _Rows(block.refined[-1:], dtype)
        self.between = _Rows(block.refined[:-1], dtype)


class _Rows:
    """Several rows over the same terms, as one small matrix product."""

    def __init__(self, rows: Sequence[Row], dtype: torch.dtype) -> None:
        # The state before the predictions, those in index order: an order that no arrival can change.
        self.terms = sorted({t for row in rows for t in row}, key=lambda t: (t.kind == "prediction", t.k))
        weights = torch.tensor([[row.get(t, 0.0) for row in rows] for t in self.terms], dtype=torch.float64)
        self.weights = weights.to(dtype).reshape(len(self.terms), len(rows), 1)

    def write(self, known: Mapping[Term, Tensor], out: Tensor) -> None:
        """Write row i into `out[i]`; `out` is [rows, D]."""
        if not self.terms:
            return
        torch.mul(self.weights[0], known[self.terms[0]], out=out)
        for weight, term in zip(self.weights[1:], self.terms[1:], strict=True):
            out.addcmul_(weight, known[term])
