"""The options of a run that a leader and a client take in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from drp.sampling.drafts import DraftRule


class RunOptions(TypedDict, total=False):
    """Options of a run without tensors and objects; see `drp.leader.request.Request`."""

    count: int | None
    shape: Sequence[int] | None
    guidance: float | None
    steps: int
    solver_options: Mapping[str, Any]
    grid: Mapping[str, Any]
    prediction_type: str
    strength: float
    drafts: int | None
    target_speedup: float | None
    target_rounds: int | None
    stride: float | None
    offsets: str | Sequence[int] | None
    rule: str | DraftRule | None
    tolerance: float
    warmup: int
    sweeps: int
    seed: int
    residuals: bool
