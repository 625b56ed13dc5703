"""Modes for pipelines: those whose rounds follow the order of the pipeline's steps."""

from __future__ import annotations

from collections.abc import Mapping

from drp.sampling.drafts import DraftRule, find_rule
from drp.sampling.mode_selection import TargetWindow, check_tolerance, make_mode
from drp.sampling.mode_wrappers import Warmup
from drp.sampling.modes import Mode

Modes = Mapping[bool, Mode]
"""The mode for schedulers that add noise, True, and that for others."""


def make_pipeline_modes(
    mode: str | Mode,
    drafts: int,
    rule: str | DraftRule | None,
    tolerance: float,
    warmup: int,
    stride: float | None,
    target_speedup: float | None,
    target_rounds: int | None,
) -> Modes:
    """Return the modes that the arguments describe, as of `make_pipeline_mode`."""
    given = mode, drafts, rule, tolerance, warmup, stride, target_speedup, target_rounds
    return {adds_noise: make_pipeline_mode(*given, adds_noise) for adds_noise in (False, True)}


def make_pipeline_mode(
    mode: str | Mode,
    drafts: int,
    rule: str | DraftRule | None,
    tolerance: float,
    warmup: int,
    stride: float | None = None,
    target_speedup: float | None = None,
    target_rounds: int | None = None,
    adds_noise: bool = False,
) -> Mode:
    """Return the mode for these arguments; raise ValueError if a pipeline cannot be sampled in it.

    adds_noise: whether the scheduler adds noise, on which the default rule and stride depend.
    """
    given = {"stride": stride, "target_speedup": target_speedup, "target_rounds": target_rounds}
    names = [name for name, value in given.items() if value is not None]
    check_tolerance(mode, tolerance)
    if not isinstance(mode, str) and names:
        raise ValueError(f"mode is {mode}, an object that defines its own stride; leave out {names[0]}")
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are given, but each of them sets the window's stride; give one")
    chosen = find_rule(rule) if rule is not None else None
    if isinstance(mode, str) and names and names != ["stride"]:
        if mode != "window":
            raise ValueError(f"{names[0]} chooses a window, and mode is {mode!r}; leave one of them out")
        made: Mode = TargetWindow(drafts, target_rounds, target_speedup, chosen, adds_noise, skips=False)
    else:
        made = mode if isinstance(mode, Mode) else make_mode(mode, drafts, tolerance, chosen, stride, None, adds_noise)
    if warmup:
        made = Warmup(made, warmup)
    if names and names != ["stride"]:
        return made  # It is always a window, which suits pipelines.
    if made.pipelined or not (made.feedback or _goes_on(made)):
        raise ValueError(
            f"mode {mode!r} goes back to steps that a pipeline has already taken, or leaves some out; "
            "choose window, aggressive, conservative, adaptive or sequential"
        )
    return made


def _goes_on(mode: Mode, steps: int = 24) -> bool:
    """Return whether every round predicts consecutive indices from the next step on, the first round only one.

    The next step is the base, alone, or the index after it, and increases from round to round.
    """
    known, after = 0, -1
    for r in mode.rounds(steps):
        k = r.predict[0]
        if not after < k <= known or r.predict != tuple(range(k, k + len(r.predict))):
            return False
        if r.base != k - 1 and (r.base != k or len(r.predict) > 1):
            return False
        known, after = max(known, r.predict[-1] + 1), k
    return known == steps
