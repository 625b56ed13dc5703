"""Limits of one run, so that it cannot delay the other runs of its leader for long.

Drawing noise takes 7 microseconds per sample. The time to compute a round's coefficients grows with the square of its
drafts: 60 ms for 256 drafts of 1,000 steps. The largest timestep is that of the worker protocol.
"""

from __future__ import annotations

import operator
from typing import Final

MAX_WORKERS: Final = 256
"""Workers of one leader."""
MAX_SAMPLES: Final = 16_384
MAX_STEPS: Final = 10_000
MAX_DRAFTS: Final = 256
MAX_EVALUATIONS: Final = 100_000
MAX_GUIDANCE: Final = 1e6
MAX_TIMESTEP: Final = 1e9
MAX_NUMBERS: Final = 2**34
"""Numbers in all slots of a run together."""


def check_whole(name: str, value: object, low: int = 0, high: int = 2**63 - 1) -> int:
    """Return a whole number, which may be numpy's or torch's, as an int; raise ValueError outside `low` to `high`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # what is checked
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or not low <= number <= high:
        raise ValueError(f"{name} is {value!r:.80}; give a whole number, {low} to {high}")
    return number
