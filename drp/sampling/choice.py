"""Choice: a mode and a number of drafts for a wanted speed-up."""

from __future__ import annotations

from drp.sampling.modes import rounds_of


def choose(speedup: float, steps: int, most_drafts: int) -> tuple[str, int]:
    """Return the mode and the fewest drafts whose steps over rounds reach `speedup`; ValueError if none does.

    The aggressive mode reaches any speed-up with fewer drafts than the conservative one, and with fewer drafts a round
    the error is smaller by more than the conservative mode's second evaluation makes it (docs/drafts.md).
    """
    if not speedup >= 1:
        raise ValueError(f"target_speedup is {speedup}; give 1 or more")
    if speedup == 1:
        return "sequential", 1
    best = 1.0
    for n in range(1, most_drafts + 1):
        best = max(best, steps / rounds_of("aggressive", steps, n))
        if best >= speedup:
            return "aggressive", n
    raise ValueError(
        f"target_speedup is {speedup:g}; with at most {most_drafts} drafts, {steps} steps allow {best:.3g}: use more "
        "devices or drafts, or more steps"
    )
