"""Rows: linear combinations of states and predictions, the currency of everything in `drp.sampling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple


class Term(NamedTuple):
    """One vector that a row may draw on: the state x_k, or the prediction taken at index k."""

    kind: Literal["state", "prediction"]
    k: int


Row = Mapping[Term, float]
"""Float64 coefficients: the vector is the sum of coefficient times term."""


def state(index: int) -> Term:
    """Name the state x_k."""
    return Term("state", index)


def prediction(index: int) -> Term:
    """Name the prediction eps_k."""
    return Term("prediction", index)


def substitute(row: Row, states: Mapping[int, Row]) -> Row:
    """Replace each state of `row` by what `states` says it is; leave the predictions."""
    result: dict[Term, float] = {}
    for term, coefficient in row.items():
        parts = states[term.k] if term.kind == "state" else {term: 1.0}
        for part, share in parts.items():
            result[part] = result.get(part, 0.0) + coefficient * share
    return result
