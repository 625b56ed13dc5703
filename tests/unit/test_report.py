"""The report of a pipeline's call: why it was not drafted, and what it doubts."""

from __future__ import annotations

from collections import Counter

from drp.diffusers import CallReport

FEW = "7 steps are too few for drafting"


def report(rounds: int, notes: Counter[str]) -> CallReport:
    return CallReport("aggressive", 3, ("cpu:0",), steps=7, rounds=rounds, evaluations=7, notes=notes, doubts=(FEW,))


def test_doubts_are_shown_and_are_no_reason() -> None:
    changed = "a step was evaluated without drafts: unet itself was changed"
    sequential = report(7, Counter({changed: 6}))
    assert sequential.reason == f"no draft could be used: {changed}"
    assert str(sequential).splitlines()[2:] == [f"  {FEW}", f"  {changed} (6 times)"]
    assert report(3, Counter()).reason == ""
    assert FEW in str(report(3, Counter()))


def test_a_speed_up_is_reported_of_drafted_calls_only() -> None:
    """Without drafts, a GPU's evaluations are not waited for, and their times are not known."""
    assert "speed-up" in str(report(3, Counter()))
    assert "speed-up" not in str(report(7, Counter({"a step was evaluated without drafts: unet was not called": 6})))
