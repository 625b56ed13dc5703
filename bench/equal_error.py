"""Equal error: what drafting is worth against the best sequential solver with fewer steps.

    python -m bench.equal_error --networks flow.safetensors --only flow

Distances are relative L2 norms to the converged solution, 240 steps of second order, averaged over samples. Both sides
choose solver, noise levels and steps freely. The equal-error speed-up of a drafted run is how many rounds the best
sequential run of the same error has, over its own. Between numbers of steps that were tried the logarithm of the error
is interpolated over that of the steps.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from bench.candidates import EVEN, HALF, TAPERED
from bench.drafting import KARRAS, SEEDS, SHIFT_1, SHIFT_3, Bench, Grid, Networks, Setting, mean
from drp.sampling.modes import Mode, Sequential, Sparse, Window

SOLUTION = 240
SEQUENTIAL = (5, 6, 7, 8, 9, 10, 12, 14, 17, 20, 24, 28, 34, 40, 48)
MODES: dict[str, Mode] = {
    "window 7 of 8": Window(8, 7),
    "window 5 of 8": Window(8, 5),
    "window 4 of 8": Window(8, 4),
    "even, stride 8": Sparse(8, 8, HALF, EVEN),
    "tapered, stride 8": Sparse(8, 8, HALF, TAPERED),
    "window 3 of 4": Window(4, 3),
    "window 4 of 4": Window(4, 4),
}
RANGES = {"n = 8, 7 to 9 rounds": (8, 7, 9), "n = 4, 8 to 13 rounds": (4, 8, 13)}


def solvers(predicts: str) -> list[tuple[str, Grid]]:
    """Return the solvers with their grids that both sides may choose."""
    if predicts == "flow":
        return [(name, shift) for name in ("euler", "dpmsolver++", "unipc") for shift in (SHIFT_1, SHIFT_3)]
    return [("dpmsolver++", KARRAS), ("unipc", KARRAS), ("dpmsolver++", ()), ("unipc", ())]


def sequential_rounds(error: float, best: Sequence[tuple[int, float]]) -> float:
    """Return how many steps the best sequential runs need for an error; the most that were tried where none does."""
    for (few, worse), (many, better) in itertools.pairwise(best):
        if better <= error <= worse:
            share = (math.log(worse) - math.log(error)) / (math.log(worse) - math.log(better))
            return math.exp(math.log(few) + share * (math.log(many) - math.log(few)))
    return float(best[0][0] if error > best[0][1] else best[-1][0])


@click.command()
@click.option("--networks", "-w", multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--only", help="Networks, by name, with commas between.")
@click.option("--samples", default=8, show_default=True)
@click.option("--guidance", default=2.0, show_default=True)
@click.option("--steps", default="28,48", show_default=True, help="Of drafted runs.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON.")
def main(
    networks: tuple[Path, ...], only: str | None, samples: int, guidance: float, steps: str, out: Path | None
) -> None:
    """Print the equal-error speed-up of the best drafted run in each range of rounds."""
    torch.set_num_threads(1)
    nets = Networks(networks)
    bench = Bench(nets, SEEDS["report"] + 5000, samples, Path("/dev/null"))
    rows: list[dict[str, Any]] = []
    for name in only.split(",") if only else nets.names:
        predicts = nets[name][1]
        ends = ("dpmsolver++", SHIFT_1) if predicts == "flow" else ("dpmsolver++", KARRAS)
        solution = bench.run(Setting(name, ends[0], SOLUTION, guidance, ends[1]), Sequential())

        def distance(setting: Setting, mode: Mode, solution: torch.Tensor = solution) -> float:
            x = bench.run(setting, mode)
            return mean(((x - solution).flatten(1).norm(dim=1) / solution.flatten(1).norm(dim=1)).tolist())

        best = []
        for n in SEQUENTIAL:
            made = {
                f"{s} {dict(g)}": distance(Setting(name, s, n, guidance, g), Sequential()) for s, g in solvers(predicts)
            }
            chosen = min(made, key=made.__getitem__)
            best.append((n, made[chosen]))
            print(f"{name}: {n} sequential steps {made[chosen]:.4f} ({chosen})", flush=True)
        best = [(n, min(e for k, e in best if k <= n)) for n, _ in best]
        for solver, grid in solvers(predicts):
            for n in map(int, steps.split(",")):
                for label, mode in MODES.items():
                    rounds = len(list(mode.rounds(n)))
                    if not any(low <= rounds <= high and mode.width == w for w, low, high in RANGES.values()):
                        continue
                    error = distance(Setting(name, solver, n, guidance, grid), mode)
                    gain = sequential_rounds(error, best) / rounds
                    rows.append({"network": name, "run": f"{label}, {solver} {dict(grid)} {n}", "n": mode.width})
                    rows[-1] |= {"rounds": rounds, "steps": n, "error": error, "gain": gain}
        for title, (width, low, high) in RANGES.items():
            for some in ((28,), tuple(map(int, steps.split(",")))):
                found = [r for r in rows if r["network"] == name and r["n"] == width and r["steps"] in some]
                found = [r for r in found if low <= r["rounds"] <= high]
                if found:
                    top = max(found, key=lambda r: r["gain"])
                    print(f"{name}, {title}, steps {some}: {top['gain']:.2f} ({top['run']}, {top['rounds']} rounds)")
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
