"""Equal error: what drafting is worth against the best sequential solver with fewer steps.

    python -m bench.equal_error --networks flow.safetensors --only flow --out bench/results/equal-error-flow.json

Distances are relative L2 norms to the converged solution, 240 steps of second order, averaged over samples. Both sides
choose solver, noise levels and steps freely, the drafted side also stride and offsets. The equal-error speed-up of a
drafted run is how many rounds the best sequential run of the same error has, over its own, where the error is the mean
or the median over the samples. Between numbers of steps that were tried the logarithm of the error is interpolated over
that of the steps.

All drafted runs are tried on some seeds, and the best of them again on more; the best of these is measured on others.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import torch

from bench.candidates import HALF
from bench.drafting import KARRAS, SEEDS, SHIFT_1, SHIFT_3, Bench, Grid, Networks, Setting, mean
from bench.figures import machine
from drp.sampling.mode_selection import PATTERNS, spaced_offsets
from drp.sampling.modes import Mode, Sequential, Sparse, Window

SOLUTION = 240
SEQUENTIAL = (5, 6, 7, 8, 9, 10, 12, 14, 17, 20, 24, 28, 34, 40, 48)
RANGES = {8: (7, 8, 9), 4: (8, 10, 13)}
"""By the number of drafts, the numbers of rounds that are tried."""
RHO_5: Grid = (("rho", 5.0), ("sigmas", "karras"))
FINALISTS = 4
"""Drafted runs that are tried again, on MORE times as many samples."""
MORE = 3


class Drafted(NamedTuple):
    """A drafted run: its solver with grid, steps, rounds, the mode's name and the mode."""

    solver: str
    grid: Grid
    steps: int
    rounds: int
    label: str
    mode: Mode

    def __str__(self) -> str:
        return f"{self.label}, {self.solver} {dict(self.grid)}, {self.steps} steps, {self.rounds} rounds"


class Gain(NamedTuple):
    """Equal-error speed-ups, of the mean error and of the median one."""

    mean: float
    median: float


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
    for name, pattern in {**PATTERNS, "spaced": spaced_offsets}.items():
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
    """The distances of a network's runs from its converged solution, on some seeds."""

    def __init__(self, bench: Bench, network: str, predicts: str, guidance: float) -> None:
        self._bench, self._network, self._guidance = bench, network, guidance
        grid = SHIFT_1 if predicts == "flow" else KARRAS
        self._solution = bench.run(Setting(network, "dpmsolver++", SOLUTION, guidance, grid), Sequential())
        self.mean: list[tuple[int, float]] = []
        """The mean error of the best sequential solver by the number of steps, each at most that of fewer steps."""
        self.median: list[tuple[int, float]] = []
        for steps in SEQUENTIAL:
            errors = [self._of(*solver, steps, Sequential()) for solver in solvers(predicts)]
            self.mean.append((steps, min([*map(mean, errors), *(error for _, error in self.mean)])))
            self.median.append((steps, min([*map(median, errors), *(error for _, error in self.median)])))

    def _of(self, solver: str, grid: Grid, steps: int, mode: Mode) -> list[float]:
        x = self._bench.run(Setting(self._network, solver, steps, self._guidance, grid), mode)
        apart = (x - self._solution).flatten(1).norm(dim=1) / self._solution.flatten(1).norm(dim=1)
        return [float(each) for each in apart]

    def gain(self, run: Drafted) -> Gain:
        """Return the equal-error speed-ups of a drafted run."""
        errors = self._of(run.solver, run.grid, run.steps, run.mode)
        return Gain(
            sequential_rounds(mean(errors), self.mean) / run.rounds,
            sequential_rounds(median(errors), self.median) / run.rounds,
        )


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
    facts = {"date": str(date.today()), "samples": MORE * samples, "guidance": guidance, "machine": machine()}
    for name in only.split(",") if only else nets.names:
        predicts = nets[name][1]
        choose, again, report = (
            Errors(Bench(nets, first, count, Path("/dev/null")), name, predicts, guidance)
            for first, count in (
                (SEEDS["choose"] + 5000, samples),
                (SEEDS["choose"] + 6000, MORE * samples),
                (SEEDS["report"] + 5000, MORE * samples),
            )
        )
        print(f"{name}, sequential: {', '.join(f'{n} steps {error:.4f}' for n, error in report.mean)}", flush=True)
        for n, several in RANGES.items():
            found = [
                Drafted(*solver, count, rounds, label, mode)
                for solver, count, rounds in itertools.product(solvers(predicts), map(int, steps.split(",")), several)
                for label, mode in modes(n, rounds, count).items()
            ]
            gains = {run: choose.gain(run).mean for run in found}
            for some in ({28}, {run.steps for run in found}):
                best = sorted((run for run in found if run.steps in some), key=lambda run: -gains[run])[:FINALISTS]
                finals = {run: again.gain(run) for run in best}
                run = max(best, key=lambda run: finals[run].mean)
                gain = report.gain(run)
                measured = {"gain": gain._asdict(), "gain where chosen": finals[run]._asdict()}
                rows.append({"network": name, "n": n, "steps": sorted(some), "run": str(run), **measured})
                print(
                    f"{name}, n = {n}, steps {sorted(some)}: mean {gain.mean:.2f}, median {gain.median:.2f} "
                    f"({finals[run].mean:.2f} and {finals[run].median:.2f} where chosen; {run})",
                    flush=True,
                )
    if out is not None:
        out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
