"""Equal error: what drafting is worth against the best sequential solver with fewer steps.

    python -m bench.equal_error --networks flow.safetensors --only flow

Distances are relative L2 norms to the converged solution, 240 steps of second order, averaged over samples. Both sides
choose solver, noise levels and steps freely, the drafted side also stride and offsets, on seeds of their own. The
equal-error speed-up of a drafted run is how many rounds the best sequential run of the same error has, over its own.
Between numbers of steps that were tried the logarithm of the error is interpolated over that of the steps.
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

from bench.candidates import HALF
from bench.drafting import KARRAS, SEEDS, SHIFT_1, SHIFT_3, Bench, Grid, Networks, Setting, mean
from drp.sampling.mode_selection import PATTERNS
from drp.sampling.modes import Mode, Sequential, Sparse, Window

SOLUTION = 240
SEQUENTIAL = (5, 6, 7, 8, 9, 10, 12, 14, 17, 20, 24, 28, 34, 40, 48)
RANGES = {8: (7, 8, 9), 4: (8, 10, 13)}
"""By the number of drafts, the numbers of rounds that are tried."""
RHO_5: Grid = (("rho", 5.0), ("sigmas", "karras"))


def modes(n: int, rounds: int, steps: int) -> dict[str, Mode]:
    """Return the windows with at most n drafts that take `steps` steps in so many rounds, by name."""
    stride = (steps - 1) / (rounds - 1)
    if stride > 2 * n:
        return {}
    found: dict[str, Mode] = {
        f"window {stride:.3g} of {drafts}": Window(drafts, stride)
        for drafts in sorted({n * 5 // 8, n * 3 // 4, n})
        if stride <= drafts
    }
    for name, pattern in PATTERNS.items():
        offsets = pattern(n)
        if name != "dense" and stride <= offsets[-1]:
            found[f"{name}, stride {stride:.3g}"] = Sparse(n, stride, HALF, offsets)
    return found


def solvers(predicts: str) -> list[tuple[str, Grid]]:
    """Return the solvers with their grids that both sides may choose."""
    if predicts == "flow":
        return [(name, shift) for name in ("euler", "dpmsolver++", "unipc") for shift in (SHIFT_1, SHIFT_3)]
    return [*((name, grid) for name in ("dpmsolver++", "unipc") for grid in (KARRAS, RHO_5)), ("unipc", ())]


def sequential_rounds(error: float, best: Sequence[tuple[int, float]]) -> float:
    """Return how many steps the best sequential runs need for an error; the most that were tried where none does."""
    for (few, worse), (many, better) in itertools.pairwise(best):
        if better <= error <= worse:
            share = (math.log(worse) - math.log(error)) / (math.log(worse) - math.log(better))
            return math.exp(math.log(few) + share * (math.log(many) - math.log(few)))
    return float(best[0][0] if error > best[0][1] else best[-1][0])


class Errors:
    """The mean distances of a network's runs from its converged solution, on some seeds."""

    def __init__(self, bench: Bench, network: str, predicts: str, guidance: float) -> None:
        self._bench, self._network, self._guidance, self._solvers = bench, network, guidance, solvers(predicts)
        grid = SHIFT_1 if predicts == "flow" else KARRAS
        self._solution = bench.run(Setting(network, "dpmsolver++", SOLUTION, guidance, grid), Sequential())

    def of(self, solver: str, grid: Grid, steps: int, mode: Mode) -> float:
        """Return the error of runs with a solver, in a mode."""
        x = self._bench.run(Setting(self._network, solver, steps, self._guidance, grid), mode)
        apart = (x - self._solution).flatten(1).norm(dim=1) / self._solution.flatten(1).norm(dim=1)
        return mean(apart.tolist())

    def sequential(self) -> list[tuple[int, float]]:
        """Return the errors of the best solver by the number of steps, each at most that of fewer steps."""
        best: list[tuple[int, float]] = []
        for steps in SEQUENTIAL:
            error = min(self.of(*solver, steps, Sequential()) for solver in self._solvers)
            best.append((steps, min([error, *(e for _, e in best)])))
        return best


@click.command()
@click.option("--networks", "-w", multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--only", help="Networks by name, separated by commas.")
@click.option("--samples", default=8, show_default=True)
@click.option("--guidance", default=2.0, show_default=True)
@click.option("--steps", default="28,48", show_default=True, help="Of drafted runs.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON.")
def main(
    networks: tuple[Path, ...], only: str | None, samples: int, guidance: float, steps: str, out: Path | None
) -> None:
    """Print the equal-error speed-up of the best drafted run in each range of rounds.

    Which run is the best is found on some seeds, and its speed-up is measured on others.
    """
    torch.set_num_threads(1)
    nets = Networks(networks)
    rows: list[dict[str, Any]] = []
    for name in only.split(",") if only else nets.names:
        predicts = nets[name][1]
        choose, report = (
            Errors(Bench(nets, first + 5000, samples, Path("/dev/null")), name, predicts, guidance)
            for first in (SEEDS["choose"], SEEDS["report"])
        )
        tried = choose.sequential()
        known = report.sequential()
        print(f"{name}, sequential: {', '.join(f'{n} steps {error:.4f}' for n, error in known)}", flush=True)
        for n, several in RANGES.items():
            found = []
            for (solver, grid), count, rounds in itertools.product(
                solvers(predicts), map(int, steps.split(",")), several
            ):
                for label, mode in modes(n, rounds, count).items():
                    gain = sequential_rounds(choose.of(solver, grid, count, mode), tried) / rounds
                    found.append((gain, count, rounds, label, solver, grid, mode))
            for some in ({28}, {one[1] for one in found}):
                top = max((one for one in found if one[1] in some), key=lambda one: one[0])
                chosen, count, rounds, label, solver, grid, mode = top
                gain = sequential_rounds(report.of(solver, grid, count, mode), known) / rounds
                run = f"{label}, {solver} {dict(grid)}, {count} steps, {rounds} rounds"
                rows.append({"network": name, "n": n, "steps": sorted(some), "run": run, "gain": gain})
                print(
                    f"{name}, n = {n}, steps {sorted(some)}: {gain:.2f} ({chosen:.2f} where chosen; {run})", flush=True
                )
    if out is not None:
        out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
