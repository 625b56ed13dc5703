"""Rows: linear combinations of vectors, the currency of everything in `drp.sampling`.

A solver writes its steps over states, the two estimates and fresh noise. A plan replaces the estimates by what they are
made of, so that what is computed is over states, predictions, the inputs that these were taken at, and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

Kind = Literal["state", "input", "prediction", "noise", "data", "epsilon"]


class Term(NamedTuple):
    """One vector that a row may draw on."""

    kind: Kind
    k: int


Row = Mapping[Term, float]
"""Float64 coefficients: the vector is the sum of coefficient times term."""


def state(index: int) -> Term:
    """Name the state x_k."""
    return Term("state", index)


def given(index: int) -> Term:
    """Name the input at which the prediction at k was taken: the draft d_k, or the state itself."""
    return Term("input", index)


def prediction(index: int) -> Term:
    """Name the network's output at k."""
    return Term("prediction", index)


def noise(index: int) -> Term:
    """Name the standard normal numbers of the step that starts at k."""
    return Term("noise", index)


def data(index: int) -> Term:
    """Name the estimate of the clean sample at k; with `epsilon`, x_k = alpha_k data + sigma_k epsilon."""
    return Term("data", index)


def epsilon(index: int) -> Term:
    """Name the estimate of the noise in x_k."""
    return Term("epsilon", index)


def add(*parts: tuple[float, Row]) -> Row:
    """Return the sum of factor times row; coefficients that come out as exactly zero are left out."""
    total: dict[Term, float] = {}
    for factor, row in parts:
        for term, coefficient in row.items():
            total[term] = total.get(term, 0.0) + factor * coefficient
    return {term: coefficient for term, coefficient in total.items() if coefficient != 0.0}


def substitute(row: Row, meaning: Callable[[Term], Row]) -> Row:
    """Replace each term of `row` by the row that `meaning` gives for it."""
    return add(*((coefficient, meaning(term)) for term, coefficient in row.items()))
