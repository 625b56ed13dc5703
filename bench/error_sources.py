"""Where the error comes from: what each advance of a drafted run adds to the error of the sample.

    python -m bench.error_sources --networks noise.safetensors --only noise

From the state after each advance, the run is continued sequentially to the end. What an advance adds is the distance
between the samples that follow from the state after it and from the state before it, relative to the sequential sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import click
import torch
from torch import Tensor

from bench.drafting import SEEDS, Bench, Networks, Setting, settings_for
from drp.sampling.linear import Symbol
from drp.sampling.modes import Sequential, Window
from drp.sampling.predictions import estimates
from drp.sampling.registry import make_solver


class Continuation:
    """Sequential steps of a setting from any of a run's states."""

    def __init__(self, bench: Bench, networks: Networks, setting: Setting) -> None:
        self._evaluate, predicts = networks[setting.network]
        self._solver = make_solver(setting.solver, setting.steps, predicts, dict(setting.grid), dict(setting.options))
        grid = self._solver.grid
        self._alphas, self._sigmas = grid.alphas.tolist(), grid.sigmas.tolist()
        self._cond = bench.conditions(setting)
        self._reads = [estimates(predicts, self._alphas[k], self._sigmas[k]) for k in range(grid.steps)]

    def sample(self, states: Mapping[int, Tensor], begin: int) -> Tensor:
        """Return the sample that follows from the states up to index `begin`."""
        x, data = dict(states), dict[int, Tensor]()
        for k in range(begin, self._solver.grid.steps):
            rows = self._solver.step(k).items()
            x[k + 1] = sum((c * self._value(term, x, data) for term, c in rows), torch.zeros_like(x[k]))
        return x[self._solver.grid.steps]

    def _value(self, term: Symbol, x: Mapping[int, Tensor], data: dict[int, Tensor]) -> Tensor:
        kind, k = term
        if kind == "state":
            return x[k]
        if k not in data:
            t = torch.full((len(x[k]),), float(self._solver.grid.timesteps[k]))
            read = self._reads[k]
            data[k] = read.data_x * x[k] + read.data_p * self._evaluate(x[k], t, self._cond)
        return data[k] if kind == "data" else (x[k] - self._alphas[k] * data[k]) / self._sigmas[k]


def keep(states: dict[int, Tensor], k: int, state: Tensor) -> None:
    """Keep a copy of the state at index k."""
    states[k] = state.clone()


@click.command()
@click.option("--networks", "-w", multiple=True, type=click.Path(exists=True, path_type=Path))
@click.option("--only", help="Networks by name, separated by commas.")
@click.option("--samples", default=32, show_default=True)
@click.option("--drafts", default=8, show_default=True)
@click.option("--stride", default=5.0, show_default=True)
def main(networks: tuple[Path, ...], only: str | None, samples: int, drafts: int, stride: float) -> None:
    """Print, for each setting without noise, what the advances add: mean, and mean of the worst sixteenth."""
    torch.set_num_threads(1)
    nets = Networks(networks)
    bench = Bench(nets, SEEDS["choose"], samples, Path("/dev/null"))
    mode = Window(drafts, stride)
    for name in only.split(",") if only else nets.names:
        for setting in settings_for(nets[name][1], name, False):
            if bench.adds_noise(setting):
                continue
            exact = bench.run(setting, Sequential()).flatten(1)
            states: dict[int, Tensor] = {}
            bench.run(setting, mode, partial(keep, states))
            bases = [*mode.bases(setting.steps), setting.steps][1:]
            with torch.inference_mode():
                continuation = Continuation(bench, nets, setting)
                ends = [exact, *(continuation.sample(states, base).flatten(1) for base in bases)]
            added = torch.stack([(b - a).norm(dim=1) for a, b in itertools.pairwise(ends)]) / exact.norm(dim=1)
            worst = ((ends[-1] - exact).norm(dim=1) / exact.norm(dim=1)).topk(max(1, samples // 16)).indices
            print(setting)
            print("  to index", *(f"{base:7d}" for base in bases))
            print("  mean    ", *(f"{float(row.mean()):7.4f}" for row in added))
            print("  worst   ", *(f"{float(row[worst].mean()):7.4f}" for row in added), flush=True)


if __name__ == "__main__":
    main()
