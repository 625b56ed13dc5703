"""A picture of the figures: speed-ups against theory, and what a round loses by carrier."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def available() -> bool:
    """Return whether matplotlib is there (the extra `plots`)."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(figures: dict[str, Any], path: Path) -> None:
    """Write a PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    emulated = figures["speedup"]
    picture, axes = plt.subplots(1, len(emulated) + 1, figsize=(5 * len(emulated) + 5, 4), layout="constrained")
    for axis, (device, found) in zip(axes, emulated.items(), strict=False):
        for mode, colour in (("aggressive", "tab:blue"), ("conservative", "tab:orange")):
            rows = [row for row in found["rows"] if row["mode"] == mode]
            n = [row["n"] for row in rows]
            axis.plot(n, [row["theory_nominal"] for row in rows], "--", color=colour, label=f"{mode}, theory")
            axis.plot(n, [row["speedup"] for row in rows], "o", color=colour, label=f"{mode}, measured")
        axis.set(
            xlabel="emulated devices",
            ylabel="speed-up over the plain loop",
            title=f"{found['steps']} steps, {device}",
            xticks=n,
        )
        axis.legend()
    carried = {name: row for name, row in figures["side_by_side"]["transports"].items() if row is not None}
    p50 = [row["lost_p50"] * 1e3 for row in carried.values()]
    p95 = [row["lost_p95"] * 1e3 for row in carried.values()]
    axes[-1].barh(list(carried), p95, color="lightgray", label="p95")
    axes[-1].barh(list(carried), p50, color="tab:blue", label="p50", height=0.5)
    axes[-1].set(xlabel="lost in a round, ms", title=f"the same rounds, {figures['side_by_side']['device']}")
    axes[-1].invert_yaxis()
    axes[-1].legend()
    picture.savefig(path, dpi=120)
    plt.close(picture)
