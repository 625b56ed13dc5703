r"""Rivals: other ways to sample in fewer rounds, at equal rounds and equal devices.

    python -m training.train_digits --data digits.npz --predicts flow --channels 8 16 24 --batch 64 --steps 2500 \
        --out flow.safetensors
    python -m bench.rivals --networks v.safetensors --networks flow.safetensors --write

Distances are relative L2 norms to the sequential run of 48 steps of the same solver and seed, sample by sample; the
figure is their mean. Every rival is given its best choice of what it leaves open, on the same samples: CHORDS the
number of cores and where they start, SRDS its blocks and iterations, ParaDiGMS its tolerance. Ours is the window of
that many rounds without any choice; the window with tapered offsets is printed beside it. `--write` puts the table
into docs/quality.md; `--only` and `--devices` make it in parts. `--ways ours,DRiffusion` measures these columns only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from bench.drafting import Networks, mean
from bench.quality import distances, draw
from bench.rival_samplers import Problem, chords, paradigms, srds
from bench.tables import read, update
from drp.sampling.drafts import DAMPED, PAPER
from drp.sampling.mode_selection import PATTERNS, TargetWindow
from drp.sampling.modes import Aggressive, Conservative, Mode, Sequential, Sparse, Window
from drp.sampling.reference import Denoiser, run_reference
from drp.sampling.registry import make_solver

STEPS = 48
SEED = 60_000
BUDGETS = ((4, 17), (4, 13), (8, 17), (8, 11), (8, 7))
"""Devices, and the most rounds."""
TOLERANCES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
BLOCKS = (4, 6, 7, 8, 10, 12, 16)
PAPERS_STARTS = (0, 2, 4, 8, 16, 24, 32, 40)
"""Where the cores of CHORDS start: its authors' for 8 cores and 50 steps."""


@dataclass(frozen=True)
class Outcome:
    """A way of sampling: its mean distance, its mean rounds, and what was chosen."""

    error: float
    rounds: float
    choice: str


class Bench:
    """One network with its noises, and the sequential run that everything is measured by."""

    def __init__(self, denoiser: Denoiser, predicts: str, samples: int) -> None:
        self._denoiser, self._predicts = denoiser, predicts
        self._name = "euler" if predicts == "flow" else "ddim"
        self._grid = {"shift": 3.0} if predicts == "flow" else {}
        self.solver = make_solver(self._name, STEPS, predicts, self._grid)
        self._x = torch.cat([draw(SEED + i) for i in range(samples)])
        self._cond = {"labels": torch.arange(samples) % 10, "guidance": torch.tensor(2.0)}
        self._exact = self._reference(self._name, STEPS, Sequential())[0]
        self._known: dict[tuple[int, str], Outcome] = {}

    def _reference(self, solver: str, steps: int, mode: Mode) -> tuple[Tensor, int]:
        made = make_solver(solver, steps, self._predicts, self._grid)
        result = run_reference(self._denoiser, made, mode, self._x * made.grid.start, self._cond)
        return result.samples, result.rounds

    def mode(self, mode: Mode, choice: str) -> Outcome:
        """Return what a mode of drafting does."""
        x, rounds = self._reference(self._name, STEPS, mode)
        return Outcome(mean(distances(x, self._exact).tolist()), rounds, choice)

    def fewer(self, steps: int, solver: str | None = None) -> Outcome:
        """Return what fewer sequential steps do."""
        x, rounds = self._reference(solver or self._name, steps, Sequential())
        return Outcome(mean(distances(x, self._exact).tolist()), rounds, f"{steps} steps")

    def rival(self, devices: int, sample: Callable[[Problem], Tensor], choice: str, alone: bool = False) -> Outcome:
        """Return what a rival does; `alone`: each sample is a run of its own, whose rounds depend on it.

        `choice` says all that it depends on besides the devices: no choice is measured twice.
        """
        if (devices, choice) in self._known:
            return self._known[devices, choice]
        count = len(self._x)
        groups = [slice(i, i + 1) for i in range(count)] if alone else [slice(count)]
        parts, rounds = [], []
        for some in groups:
            cond = {name: v[some] if v.dim() else v for name, v in self._cond.items()}
            problem = Problem(self._denoiser, self.solver, self._x[some] * self.solver.grid.start, cond, devices)
            parts.append(sample(problem))
            rounds.append(problem.rounds)
        apart = mean(distances(torch.cat(parts), self._exact).tolist())
        self._known[devices, choice] = Outcome(apart, mean(rounds), choice)
        return self._known[devices, choice]


def ours(bench: Bench, devices: int, rounds: int) -> Iterator[Outcome]:
    """Yield the window that `target_rounds` chooses."""
    mode = TargetWindow(devices, target_rounds=rounds).for_steps(STEPS)
    assert isinstance(mode, Window)
    offsets = f", offsets {mode.offsets}" if isinstance(mode, Sparse) else ""
    yield bench.mode(mode, f"window {mode.stride:.3g} of {mode.n}{offsets}")


def tapered(bench: Bench, devices: int, rounds: int) -> Outcome:
    """Return what the window with tapered offsets does, with the smallest stride, in quarters, for the rounds."""
    offsets = PATTERNS["tapered"](devices)
    for quarters in range(4, 4 * offsets[-1] + 1):
        mode = Sparse(devices, quarters / 4, DAMPED, tuple(offsets))
        if len(list(mode.rounds(STEPS))) <= rounds:
            return bench.mode(mode, f"window {quarters / 4:g} of {devices}, tapered")
    raise ValueError(f"no window of {devices} tapered drafts takes {STEPS} steps in {rounds} rounds")


def papers(bench: Bench, devices: int, rounds: int) -> Iterator[Outcome]:
    """Yield the paper's modes with the paper's drafts, on up to that many devices."""
    for kind in (Aggressive, Conservative):
        for n in range(2, devices + 1):
            if len(list(kind(n, PAPER).rounds(STEPS))) <= rounds:
                yield bench.mode(kind(n, PAPER), f"{kind.__name__.lower()} {n}")
                break  # more drafts have fewer rounds and a larger error


def all_chords(bench: Bench, devices: int, rounds: int) -> Iterator[Outcome]:
    """Yield CHORDS with some numbers of cores, and three ways to choose where they start."""
    for cores in sorted({3, 4, 6, devices}):
        last = STEPS + cores - 1 - rounds
        if cores > devices or not cores - 1 <= last < STEPS:
            continue
        shapes = {
            "its authors' starts": [start / PAPERS_STARTS[-1] for start in _thinned(cores)],
            "even starts": [j / (cores - 1) for j in range(cores)],
            "starts that double": [0.0, *(2.0 ** (j - cores + 1) for j in range(1, cores))],
        }
        for name, shape in shapes.items():
            starts = sorted({round(share * last) for share in shape})
            if len(starts) == cores:
                made = f"{name}, {'-'.join(map(str, starts))}"
                yield bench.rival(devices, partial(chords, starts=starts), made)


def _thinned(cores: int) -> list[int]:
    """Return the authors' starts for fewer cores: some of theirs, the first and the last included."""
    places = [round(j * (len(PAPERS_STARTS) - 1) / (cores - 1)) for j in range(cores)]
    return [PAPERS_STARTS[place] for place in places]


def all_srds(bench: Bench, devices: int, rounds: int) -> Iterator[Outcome]:
    """Yield SRDS with some numbers of blocks and iterations."""
    for blocks in BLOCKS:
        for iterations in (1, 2, 3):
            if iterations * (STEPS // blocks - 1) + blocks > rounds + 8:
                continue  # even with as many devices as it likes it takes many more
            made = f"{blocks} blocks, {iterations} iterations"
            yield bench.rival(devices, partial(srds, blocks=blocks, iterations=iterations), made)


def all_paradigms(bench: Bench, devices: int, rounds: int) -> Iterator[Outcome]:
    """Yield ParaDiGMS with some tolerances, which decide on the rounds."""
    for tolerance in TOLERANCES:
        made = f"tolerance {tolerance:g}"
        yield bench.rival(devices, partial(paradigms, tolerance=tolerance), made, alone=True)


def fewer(bench: Bench, _: int, rounds: int) -> Iterator[Outcome]:
    """Yield as many sequential steps as there are rounds."""
    yield bench.fewer(rounds)


def fewer_unipc(bench: Bench, _: int, rounds: int) -> Iterator[Outcome]:
    """Yield as many sequential steps of UniPC as there are rounds."""
    yield bench.fewer(rounds, "unipc")


WAYS: dict[str, Callable[[Bench, int, int], Iterator[Outcome]]] = {
    "ours": ours,
    "DRiffusion": papers,
    "CHORDS": all_chords,
    "SRDS": all_srds,
    "ParaDiGMS": all_paradigms,
    "fewer steps": fewer,
    "fewer steps of UniPC": fewer_unipc,
}
"""What is measured for each column of the table."""


def best(found: Iterator[Outcome], rounds: int) -> tuple[Outcome | None, Outcome | None]:
    """Return the best within the rounds, or the one with the fewest rounds if none is."""
    every = list(found)
    within = [outcome for outcome in every if outcome.rounds <= rounds]
    if within:
        return min(within, key=lambda outcome: outcome.error), None
    return None, min(every, key=lambda outcome: (outcome.rounds, outcome.error), default=None)


def cell(found: tuple[Outcome | None, Outcome | None]) -> str:
    """Return a cell of the table: the error, or in parentheses that of more rounds than there are."""
    within, beyond = found
    if within is not None:
        return f"{within.error:.4f}"
    return "none" if beyond is None else f"({beyond.error:.4f} in {beyond.rounds:.3g})"


@click.command()
@click.option("--networks", "-w", multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--only", help="Networks by name, separated by commas.")
@click.option("--devices", "only_devices", type=int, help="Only the rows of this number of devices.")
@click.option("--ways", help=f"Columns, separated by commas: {', '.join(WAYS)}; by default all.")
@click.option("--samples", default=4, show_default=True)
@click.option("--write", is_flag=True, help="Put the rows into the table of docs/quality.md.")
def main(
    networks: tuple[Path, ...],
    only: str | None,
    only_devices: int | None,
    ways: str | None,
    samples: int,
    write: bool,
) -> None:
    """Measure every rival on `digits` and on other networks, within some rounds on some devices."""
    columns = ways.split(",") if ways else list(WAYS)
    if unknown := [name for name in columns if name not in WAYS]:
        raise click.UsageError(f"there is no column {unknown[0]!r}; choose of {', '.join(WAYS)}")
    if write and ways:
        raise click.UsageError("--write needs all columns; leave out --ways")
    torch.set_num_threads(1)
    nets = Networks(networks)
    rows: dict[str, str] = {}
    for name in only.split(",") if only else nets.names:
        denoiser, predicts = nets[name]
        bench = Bench(denoiser, predicts, samples)
        for devices, rounds in BUDGETS:
            if only_devices not in (None, devices):
                continue
            found = [best(WAYS[name](bench, devices, rounds), rounds) for name in columns]
            label = f"{name} ({'noise' if predicts == 'epsilon' else predicts}), {devices} devices, {rounds} rounds"
            rows[label] = f"| {label} | {' | '.join(map(cell, found))} |"
            print(rows[label], flush=True)
            chosen = [within or beyond for within, beyond in found]
            print("  " + "; ".join(one.choice if one else "none" for one in chosen), flush=True)
            beside = tapered(bench, devices, rounds)
            print(f"  beside: {beside.error:.4f}, {beside.choice}", flush=True)
    if write:
        page, head = Path(__file__).parent.parent / "docs" / "quality.md", "relative L2 to 48 steps"
        labels = {*rows, *read("rivals", page)} - {head}
        order = sorted(labels, key=lambda label: (not label.startswith("digits"), label))
        update("rivals", f"| {head} | {' | '.join(WAYS)} |", rows, order, page)


if __name__ == "__main__":
    main()
