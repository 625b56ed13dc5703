"""Equal rounds: where drafting is no use, against the best sequential solver with as many steps as there are rounds.

    python -m bench.equal_rounds --networks noise.safetensors --networks flow.safetensors --write

Distances are relative L2 norms to the converged solution, 240 steps of second order, averaged over samples. Both sides
choose their solver and noise levels among the same; what drafts has the default mode and as many steps as the row says.
A figure is the error of the best drafted run over that of the best sequential one: above 1, fewer sequential steps are
nearer to the solution. `--write` puts the table into docs/drafts.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from bench.drafting import KARRAS, SEEDS, SHIFT_1, SHIFT_3, Bench, Grid, Networks, Setting, mean
from bench.tables import update
from drp.sampling.drafts import DAMPED
from drp.sampling.mode_selection import make_mode
from drp.sampling.modes import Mode, Sequential

SOLUTION = 240
STEPS = (4, 6, 8, 10, 14, 20, 28, 48)
DRAFTS = (2, 4, 8)
Solver = tuple[str, Grid, Grid]
"""Name, options of the grid, options of the solver."""

THIRD: Grid = (("order", 3),)
NOISE: Sequence[Solver] = (
    ("dpmsolver++", KARRAS, ()),
    ("dpmsolver++", (), ()),
    ("dpmsolver++", KARRAS, THIRD),
    ("unipc", KARRAS, ()),
    ("unipc", (), ()),
)
FLOW: Sequence[Solver] = tuple((name, shift, ()) for name in ("euler", "unipc") for shift in (SHIFT_1, SHIFT_3))


class Errors:
    """The distances of a network's runs from its converged solution."""

    def __init__(self, bench: Bench, network: str, predicts: str, guidance: float) -> None:
        self._bench, self._network, self._guidance = bench, network, guidance
        self._solvers = FLOW if predicts == "flow" else NOISE
        grid = SHIFT_1 if predicts == "flow" else KARRAS
        self._solution = bench.run(Setting(network, "dpmsolver++", SOLUTION, guidance, grid), Sequential())
        self._sequential: dict[int, float] = {}

    def best(self, steps: int, mode: Mode) -> float:
        """Return the error in a mode, with the best solver."""
        return min(self._error(solver, steps, mode) for solver in self._solvers)

    def sequential(self, steps: int) -> float:
        """Return the error of sequential steps, with the best solver."""
        if steps not in self._sequential:
            self._sequential[steps] = self.best(steps, Sequential())
        return self._sequential[steps]

    def _error(self, solver: Solver, steps: int, mode: Mode) -> float:
        name, grid, options = solver
        x = self._bench.run(Setting(self._network, name, steps, self._guidance, grid, options), mode)
        apart = (x - self._solution).flatten(1).norm(dim=1) / self._solution.flatten(1).norm(dim=1)
        return mean(apart.tolist())


@click.command()
@click.option("--networks", "-w", multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--only", help="Networks by name, separated by commas.")
@click.option("--samples", default=8, show_default=True)
@click.option("--guidance", default=2.0, show_default=True)
@click.option("--write", is_flag=True, help="Put the rows into the table of docs/drafts.md.")
def main(networks: tuple[Path, ...], only: str | None, samples: int, guidance: float, write: bool) -> None:
    """Print the error of drafted runs over that of the best sequential one with as many steps as there are rounds."""
    torch.set_num_threads(1)
    nets = Networks(networks)
    bench = Bench(nets, SEEDS["report"] + 5000, samples, Path("/dev/null"))
    head = "error of drafted over sequential, equal rounds"
    rows: dict[str, str] = {}
    for name in only.split(",") if only else nets.names:
        errors = Errors(bench, name, nets[name][1], guidance)
        for steps in STEPS:
            cells = []
            for n in DRAFTS:
                if n > steps:
                    cells.append("-")
                    continue
                mode = make_mode("window", n, 0.0, DAMPED)
                rounds = len(list(mode.rounds(steps)))
                cells.append(f"{errors.best(steps, mode) / errors.sequential(rounds):.2f} ({rounds})")
            label = f"{name}, {steps} steps"
            rows[label] = f"| {label} | {' | '.join(cells)} |"
            print(rows[label], flush=True)
    if write:
        page = Path(__file__).parent.parent / "docs" / "drafts.md"
        columns = " | ".join(f"n = {n} (rounds)" for n in DRAFTS)
        update("equal rounds", f"| {head} | {columns} |", rows, rows, page)


if __name__ == "__main__":
    main()
