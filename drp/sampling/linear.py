"""Linear combinations of symbolic vectors, in which `drp.sampling` expresses solvers and plans.

A solver expresses its steps in states, the two estimates and fresh noise. A plan substitutes the estimates, so that
what is computed depends on states, predictions, the inputs of these predictions, and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple

Kind = Literal["state", "input", "prediction", "noise", "data", "epsilon"]


class Symbol(NamedTuple):
    """A vector that occurs in linear combinations."""

    kind: Kind
    k: int


LinearCombination = Mapping[Symbol, float]
"""Float64 coefficients: the vector is the sum of coefficient times term."""


state = partial(Symbol, "state")
"""The state x_k."""
model_input = partial(Symbol, "input")
"""The input of the prediction at k: the draft d_k, or the state itself."""
prediction = partial(Symbol, "prediction")
"""The prediction at k."""
noise = partial(Symbol, "noise")
"""The standard normal noise that the step from k adds."""
data = partial(Symbol, "data")
"""The data estimate at k; with `epsilon`, x_k = alpha_k data + sigma_k epsilon."""
epsilon = partial(Symbol, "epsilon")
"""The noise estimate at k."""


def add(*parts: tuple[float, LinearCombination]) -> LinearCombination:
    """Return the sum of the products of factors and rows, without coefficients that are exactly 0."""
    total: dict[Symbol, float] = {}
    for factor, row in parts:
        for term, coefficient in row.items():
            total[term] = total.get(term, 0.0) + factor * coefficient
    return {term: coefficient for term, coefficient in total.items() if coefficient != 0.0}


def substitute(row: LinearCombination, meaning: Callable[[Symbol], LinearCombination]) -> LinearCombination:
    """Replace each symbol of `row` by the linear combination that `meaning` returns for it."""
    return add(*((coefficient, meaning(term)) for term, coefficient in row.items()))
