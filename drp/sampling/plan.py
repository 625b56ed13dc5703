"""Plans: a mode and a solver, worked out into rows before the run begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from drp.sampling.modes import Mode, Round
from drp.sampling.rows import Row, state, substitute
from drp.sampling.solvers import Solver


@dataclass(frozen=True)
class Block:
    """One round in rows.

    `drafts[j]` is the input of the evaluation at `round.predict[j]`, over the state and the prediction at the base.
    `refined[i]` is the state `round.base + 1 + i`, over the state at the base and the predictions since.
    """

    round: Round
    drafts: tuple[Row, ...]
    refined: tuple[Row, ...]


def make_plan(solver: Solver, mode: Mode) -> tuple[Block, ...]:
    """Return the blocks of a whole run; raise ValueError where the mode's rounds do not fit together."""
    blocks: list[Block] = []
    steps = solver.grid.steps
    base, predicted = 0, set[int]()
    for r in mode.rounds(steps):
        _check_round(r, base, predicted, mode, steps)
        drafts = tuple(_draft(solver, base, j) for j in r.predict)
        predicted.update(r.predict)
        chain = _refine(solver, base, r.advance)
        blocks.append(Block(r, drafts, tuple(chain[k] for k in range(base + 1, r.advance + 1))))
        base = r.advance
    if base != steps:
        raise ValueError(f"{mode} ends at step {base} of {steps}; its rounds must advance to the last step")
    return tuple(blocks)


def _draft(solver: Solver, base: int, index: int) -> Row:
    return {state(base): 1.0} if index == base else solver.transition(base, index)


def _refine(solver: Solver, base: int, advance: int) -> Mapping[int, Row]:
    """Return the states from `base` to `advance` by ordinary steps, as rows over the state at `base`."""
    chain: dict[int, Row] = {base: {state(base): 1.0}}
    for k in range(base, advance):
        chain[k + 1] = substitute(solver.transition(k, k + 1), chain)
    return chain


def _check_round(r: Round, base: int, predicted: set[int], mode: Mode, steps: int) -> None:
    """Hold a round of somebody's own mode to the rules; the message says which one it breaks."""
    known = predicted | set(r.predict)
    if r.base != base:
        raise ValueError(f"{mode}: {r} starts at {r.base}, but the round before advanced to {base}")
    if not r.predict or len(r.predict) > mode.width:
        raise ValueError(f"{mode}: {r} predicts {len(r.predict)} indices; a round predicts 1 to {mode.width}")
    if list(r.predict) != sorted(set(r.predict)) or r.predict[0] < base or r.predict[-1] >= steps:
        raise ValueError(f"{mode}: {r} must predict increasing indices from {base} to {steps - 1}")
    if r.predict[-1] > base and base not in predicted:
        raise ValueError(f"{mode}: {r} drafts from index {base}, which no earlier round has predicted")
    if not base <= r.advance <= steps or not known.issuperset(range(base, r.advance)):
        raise ValueError(f"{mode}: {r} advances to {r.advance} without a prediction at every step before")
