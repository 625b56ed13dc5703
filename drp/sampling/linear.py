"""Linear combinations of symbolic vectors, in which `drp.sampling` expresses solvers and plans.

A solver writes its steps over states, the two estimates and fresh noise. A plan replaces the estimates by what they are
made of, so that what is computed is over states, predictions, the inputs that these were taken at, and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

Kind = Literal["state", "input", "prediction", "noise", "data", "epsilon"]


class Symbol(NamedTuple):
    """One vector that a row may draw on."""

    kind: Kind
    k: int


LinearCombination = Mapping[Symbol, float]
"""Float64 coefficients: the vector is the sum of coefficient times term."""


def state(index: int) -> Symbol:
    """Name the state x_k."""
    return Symbol("state", index)


def model_input(index: int) -> Symbol:
    """Name the input at which the prediction at k was taken: the draft d_k, or the state itself."""
    return Symbol("input", index)


def prediction(index: int) -> Symbol:
    """Name the network's output at k."""
    return Symbol("prediction", index)


def noise(index: int) -> Symbol:
    """Name the standard normal numbers of the step that starts at k."""
    return Symbol("noise", index)


def data(index: int) -> Symbol:
    """Name the estimate of the clean sample at k; with `epsilon`, x_k = alpha_k data + sigma_k epsilon."""
    return Symbol("data", index)


def epsilon(index: int) -> Symbol:
    """Name the estimate of the noise in x_k."""
    return Symbol("epsilon", index)


def add(*parts: tuple[float, LinearCombination]) -> LinearCombination:
    """Return the sum of factor times row; coefficients that come out as exactly zero are left out."""
    total: dict[Symbol, float] = {}
    for factor, row in parts:
        for term, coefficient in row.items():
            total[term] = total.get(term, 0.0) + factor * coefficient
    return {term: coefficient for term, coefficient in total.items() if coefficient != 0.0}


def substitute(row: LinearCombination, meaning: Callable[[Symbol], LinearCombination]) -> LinearCombination:
    """Replace each term of `row` by the row that `meaning` gives for it."""
    return add(*((coefficient, meaning(term)) for term, coefficient in row.items()))
