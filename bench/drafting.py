"""Drafting: modes and draft rules in many settings, by their distance to the sequential run of the same steps.

    python -m training.train_digits --data digits.npz --predicts flow --channels 8 16 24 --out flow.safetensors
    python -m bench.drafting choose --networks flow.safetensors         # the search, on some seeds
    python -m bench.drafting report --networks flow.safetensors         # the default against the paper's, on others
    python -m bench.drafting check --cells --samples 64                 # on seeds that no default was changed for

A setting is a network, a solver with its grid, steps, and guidance; `digits` is always among the networks.
Distances are relative L2 norms, sample by sample, and the figure of a setting is their mean. What was measured is kept
in a file of JSON lines, and not measured again, so both may be stopped and gone on with.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch import Tensor

from bench.candidates import CANDIDATES, PAPERS
from bench.other_networks import load
from bench.quality import channels_last
from drp import models
from drp.sampling.mode_selection import make_mode
from drp.sampling.modes import Mode, Sequential
from drp.sampling.reference import Denoiser, run_reference
from drp.sampling.registry import make_solver
from drp.sampling.run import Callback

SEEDS = {"choose": 20_000, "report": 40_000, "check": 60_000}


@dataclass(frozen=True)
class Setting:
    """A network by name, a solver with its grid and options, steps and guidance."""

    network: str
    solver: str
    steps: int
    guidance: float
    grid: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        grid = "".join(f" {name} {value}" for name, value in self.grid + self.options)
        return f"{self.network}, {self.solver}{grid}, {self.steps} steps, guidance {self.guidance:g}"


Grid = tuple[tuple[str, Any], ...]

KARRAS: Grid = (("sigmas", "karras"),)
SHIFT_1: Grid = (("shift", 1.0),)
SHIFT_3: Grid = (("shift", 3.0),)
NOISE: Sequence[tuple[str, Grid, int, float]] = (
    ("ddim", (), 48, 2.0),
    ("ddim", (), 28, 7.5),
    ("dpmsolver++", KARRAS, 28, 2.0),
    ("dpmsolver++", KARRAS, 48, 5.0),
    ("unipc", (), 20, 2.0),
    ("ddpm", (), 48, 2.0),
    ("sde-dpmsolver++", (), 28, 2.0),
)
FLOW: Sequence[tuple[str, Grid, int, float]] = (
    ("euler", SHIFT_1, 28, 2.0),
    ("euler", SHIFT_1, 48, 7.5),
    ("euler", SHIFT_3, 28, 5.0),
    ("euler", SHIFT_3, 48, 2.0),
)


def settings_for(predicts: str, name: str, full: bool) -> list[Setting]:
    """Return the settings that a network is tried in: with `full` all of them, else some of every kind."""
    if not full:
        some = FLOW if predicts == "flow" else NOISE
        return [Setting(name, solver, steps, guidance, grid) for solver, grid, steps, guidance in some]
    found = []
    for steps, guidance in itertools.product((20, 28, 48), (1.0, 2.0, 5.0, 7.5)):
        if predicts == "flow":
            found += [Setting(name, "euler", steps, guidance, (("shift", shift),)) for shift in (1.0, 3.0)]
        else:
            solvers: tuple[tuple[str, Grid], ...] = (("ddim", ()), ("dpmsolver++", KARRAS), ("unipc", ()))
            found += [Setting(name, solver, steps, guidance, grid) for solver, grid in solvers]
    if predicts != "flow":
        found += [Setting(name, "ddpm", 48, 2.0), Setting(name, "sde-dpmsolver++", 28, 2.0)]
    return found


class Networks:
    """Networks by name, each with what it predicts: those of `training.train_digits`, and `digits`."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = {path.stem: path for path in paths}
        self._loaded: dict[str, tuple[Denoiser, str]] = {}

    @property
    def names(self) -> list[str]:
        """All of them."""
        return ["digits", *self._paths]

    def __getitem__(self, name: str) -> tuple[Denoiser, str]:
        if name not in self._loaded:
            known = self._paths.get(name)
            network, predicts = load(known) if known else (models.load("digits").predict, "epsilon")
            self._loaded[name] = channels_last(network), predicts
        return self._loaded[name]


class Bench:
    """Runs modes in settings, on seeds from `first` on."""

    def __init__(self, networks: Networks, first: int, samples: int, path: Path) -> None:
        self._networks, self._first, self._samples, self._path = networks, first, samples, path
        self._exact: dict[Setting, Tensor] = {}

    @cached_property
    def _known(self) -> dict[str, list[float]]:
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        return {row["key"]: row["distances"] for row in map(json.loads, lines)}

    def conditions(self, setting: Setting) -> dict[str, Tensor]:
        """Return the labels and the guidance of the samples."""
        seeds = range(self._first, self._first + self._samples)
        return {"labels": torch.tensor(seeds) % 10, "guidance": torch.tensor(setting.guidance)}

    def run(self, setting: Setting, mode: Mode, callback: Callback | None = None) -> Tensor:
        """Return the samples."""
        denoiser, predicts = self._networks[setting.network]
        solver = make_solver(setting.solver, setting.steps, predicts, dict(setting.grid), dict(setting.options))
        seeds = range(self._first, self._first + self._samples)
        x = torch.stack([_draw(seed) for seed in seeds])

        def fresh(k: int) -> Tensor:
            return torch.stack([_draw(1000 * seed + k) for seed in seeds])

        mode = mode.for_steps(setting.steps)
        cond = self.conditions(setting)
        return run_reference(denoiser, solver, mode, x * solver.grid.start, cond, callback, fresh).samples

    def adds_noise(self, setting: Setting) -> bool:
        """Return whether the setting's solver adds noise."""
        return make_solver(setting.solver, 2, self._networks[setting.network][1]).adds_noise

    def default(self, setting: Setting, n: int) -> Mode:
        """Return the default window with n drafts, which depends on whether the setting's solver adds noise."""
        return make_mode("window", n, 0.0, None, adds_noise=self.adds_noise(setting))

    def distances(self, setting: Setting, name: str, mode: Mode) -> list[float]:
        """Return the distance of each sample from its sequential run."""
        key = f"{setting}; {name}; {mode}; {self._first}+{self._samples}"
        if key not in self._known:
            if setting not in self._exact:
                self._exact = {setting: self.run(setting, Sequential())}
            exact, x = self._exact[setting], self.run(setting, mode)
            apart = (x - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
            self._known[key] = [round(float(each), 7) for each in apart]
            with self._path.open("a") as file:
                file.write(json.dumps({"key": key, "distances": self._known[key]}) + "\n")
        return self._known[key]


def _draw(seed: int) -> Tensor:
    return torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(seed))


def mean(values: Sequence[float]) -> float:
    """Return the mean."""
    return sum(values) / len(values)


def interval(ours: Sequence[float], papers: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the ratio of two means over the same samples, by 4,000 bootstrap draws."""
    picked = torch.randint(len(ours), (4000, len(ours)), generator=torch.Generator().manual_seed(0))
    ratios = torch.tensor(ours)[picked].mean(dim=1) / torch.tensor(papers)[picked].mean(dim=1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def geometric(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return math.exp(mean([math.log(max(value, 1e-9)) for value in values]))


def table(ratios: Mapping[str, Mapping[Setting, float]]) -> str:
    """Return candidates with their error over the paper's: geometric mean, worst setting, and by kind of setting."""
    kinds: dict[str, list[Setting]] = defaultdict(list)
    for setting in next(iter(ratios.values())):
        kinds[f"{setting.solver}{''.join(f' {v}' for _, v in setting.grid)}"].append(setting)
    lines = [f"| | mean | worst | above 1 | {' | '.join(kinds)} |", "|---" * (4 + len(kinds)) + "|"]
    for name, row in ratios.items():
        by_kind = [geometric([row[s] for s in each]) for each in kinds.values()]
        above = sum(value > 1 for value in row.values())
        figures = [f"{v:.2f}" for v in (geometric(list(row.values())), max(row.values()))]
        lines.append(f"| {name} | {' | '.join([*figures, f'{above} of {len(row)}', *(f'{v:.2f}' for v in by_kind)])} |")
    return "\n".join(lines)


@click.command()
@click.argument("what", type=click.Choice(list(SEEDS)))
@click.option("--networks", "-w", multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--only", help="Networks by name, separated by commas.")
@click.option("--samples", default=8, show_default=True)
@click.option("--full", is_flag=True, help="All steps and strengths of guidance.")
@click.option("--group", default="", help="Only the groups of candidates that begin so.")
@click.option("--cells", is_flag=True, help="Print every ratio, of means with its 95 % interval and of medians.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/drafting.jsonl"), show_default=True)
def main(
    what: str,
    networks: tuple[Path, ...],
    only: str | None,
    samples: int,
    full: bool,
    group: str,
    cells: bool,
    out: Path,
) -> None:
    """Compare modes and rules with the paper's that takes as many rounds."""
    torch.set_num_threads(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    nets = Networks(networks)
    bench = Bench(nets, SEEDS[what], samples, out)
    names = only.split(",") if only else nets.names
    settings = [s for name in names for s in settings_for(nets[name][1], name, full)]
    groups = {name: each for name, each in CANDIDATES.items() if name.startswith(group)}
    found: dict[str, dict[str, dict[Setting, float]]] = {name: defaultdict(dict) for name in groups}
    for setting in settings:
        for name, (paper, candidates) in groups.items():
            if name.startswith("fewest") and bench.adds_noise(setting):
                continue  # There, no index is skipped.
            papers = bench.distances(setting, f"paper {paper}", PAPERS[paper])
            for label, given in candidates.items():
                mode = bench.default(setting, given.width) if name.startswith("default") else given
                ours = bench.distances(setting, label, mode)
                found[name][label][setting] = ratio = mean(ours) / mean(papers)
                if cells:
                    low, high = interval(ours, papers)
                    of_medians = f"medians {median(ours) / median(papers):.2f}"
                    print(f"{setting}; {label}: {ratio:.2f} ({low:.2f} to {high:.2f}), {of_medians}", flush=True)
    for name, (paper, _) in groups.items():
        print(f"\n{name}: error over that of the paper's {paper}, {samples} samples of each setting\n")
        print(table(found[name]))


if __name__ == "__main__":
    main()
