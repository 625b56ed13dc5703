"""Linear combinations of states and predictions, summed term by term in a fixed order, as the terms become known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from drp.sampling.linear import LinearCombination, Symbol

Add = Callable[[Tensor, Tensor, Sequence[Tensor], bool], None]
"""Adds weighted terms to sums: called with the sums, the terms' weights, the terms, and whether they are the first."""


class OperationQueue(Protocol):
    """Executes a run's arithmetic later, in the order in which it was enqueued."""

    def enqueue(self, do: Callable[..., object], *args: Any) -> None:
        """Execute `do(*args)` after what was enqueued before."""
        ...

    def synchronize(self) -> None:
        """Wait until everything was executed."""
        ...


_ORDER = {"state": 0, "input": 1, "noise": 2, "prediction": 3}
SumOrder = Callable[[Symbol], tuple[int, ...]]
"""The sort key by which terms are added: fixed, whatever the order in which predictions arrive."""


def state_order(t: Symbol) -> tuple[int, ...]:
    """Order of the terms of states: known terms first, then predictions by index."""
    return _ORDER[t.kind], t.k


def draft_order(t: Symbol) -> tuple[int, ...]:
    """Order of the terms of drafts: known terms first, then states and predictions by index."""
    return t.kind in ("state", "prediction"), t.k, _ORDER[t.kind]


class Rows:
    """Several linear combinations of the same terms, as one small matrix product."""

    def __init__(self, rows: Sequence[LinearCombination], like: Tensor, order: SumOrder) -> None:
        self.terms = sorted({t for row in rows for t in row}, key=order)
        weights = torch.tensor(
            [[row.get(t, 0.0) for row in rows] for t in self.terms], dtype=torch.float64, device="cpu"
        )
        weights = weights.to(like.dtype)
        if like.is_cuda:
            weights = weights.pin_memory()  # Otherwise the host would wait for all work queued on the stream.
        self.weights = weights.to(like.device, non_blocking=True).reshape(len(self.terms), len(rows), 1)


def add_terms(out: Tensor, weights: Tensor, terms: Sequence[Tensor], first: bool) -> None:
    """Add weighted terms, one after the other, to the sums in `out`, which the first term of all initializes."""
    for place, term in enumerate(terms):
        if first and place == 0:
            torch.mul(weights[0], term, out=out)
        else:
            out.addcmul_(weights[place], term)


class PartialSum:
    """Partial sums of linear combinations, to which the terms are added in order.

    missing: the terms that were not added yet.
    """

    def __init__(self, rows: Rows, out: Tensor, add: Add) -> None:
        self.missing, self._rows, self._out, self._add = rows.terms, rows, out, add

    def add(self, terms: Sequence[Tensor]) -> None:
        """Add the next terms."""
        done = len(self._rows.terms) - len(self.missing)
        self._add(self._out, self._rows.weights[done:], terms, done == 0)
        self.missing = self.missing[len(terms) :]
