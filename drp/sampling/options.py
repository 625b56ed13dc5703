"""The options of a run that a leader and a client take in the same way."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
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


NAMES_ELSEWHERE = {
    "generator": "seed",
    "guidance_scale": "guidance",
    "latents": "noise",
    "num_images_per_prompt": "count",
    "num_inference_steps": "steps",
    "num_steps": "steps",
    "scheduler": "solver",
}
"""Names of options in diffusers, with those in drp."""


def check_names(given: Collection[str], known: Collection[str]) -> None:
    """Raise TypeError for an option that is not known; the message has the name that was probably meant."""
    for name in given:
        if name not in known:
            raise TypeError(describe_unknown(name, known))


def describe_unknown(name: str, known: Collection[str]) -> str:
    """Return the message for an option that is not known."""
    close = difflib.get_close_matches(name, known, 1)
    meant = NAMES_ELSEWHERE.get(name, close[0] if close else "")
    if meant in known:
        return f"unknown option {name!r}; did you mean {meant!r}?"
    return f"unknown option {name!r}; choose one of {', '.join(known)}"
