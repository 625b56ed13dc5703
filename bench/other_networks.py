"""Other networks: draft rules on networks that were trained for v or flow matching.

    python -m training.train_digits --data digits.npz --predicts v --channels 16 32 48 --batch 64 --out v.safetensors
    python -m bench.other_networks v.safetensors

A quarter of an hour each on one core; for the table in docs/quality.md the network that predicts v had `--steps 3000`.

Distances are relative L2 norms to the sequential run of the same steps and seed, sample by sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import Tensor

from bench.quality import STEPS, distances, draw, summary
from drp.models.digits import Digits
from drp.models.unet import UNet
from drp.sampling.drafts import DAMPED, PAPER, DraftRule
from drp.sampling.modes import Adaptive, Aggressive, Conservative, Mode, Sequential, Window
from drp.sampling.reference import run_reference
from drp.sampling.registry import make_solver
from drp.sampling.result import Result
from drp.sampling.solvers import Solver
from training.classifier import load_classifier

RULES = {
    "paper": PAPER,
    "carry 0.5": DraftRule(carry=0.5, slope=1.0),
    "carry 0.25": DraftRule(carry=0.25, slope=1.0),
    "carry 0": DraftRule(carry=0.0, slope=1.0),
    "damped": DAMPED,
}
TOLERANCE = 0.01


def load(path: Path) -> tuple[Digits, str]:
    """Return what `training.train_digits` wrote, and what it predicts."""
    with safe_open(path, "pt") as file:
        facts = file.metadata() or {}
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
    if "predicts" not in facts:
        raise click.UsageError(f"{path} does not say what it predicts; train it with training.train_digits --predicts")
    model = Digits()
    model.unet = UNet(tuple(json.loads(facts["channels"])), model.unet.label.num_embeddings - 1)
    model.unet.load_state_dict(weights)
    return model.eval().requires_grad_(False), facts["predicts"]


def grids(predicts: str) -> Mapping[str, Mapping[str, Any]]:
    """Name the grids that a kind of network is tried on."""
    return {"flow, shift 1": {"shift": 1.0}, "flow, shift 3": {"shift": 3.0}} if predicts == "flow" else {predicts: {}}


def modes(rule: DraftRule) -> Iterator[tuple[str, Mode]]:
    """Yield what is tried, by name."""
    yield "aggressive n=4", Aggressive(4, rule)
    yield "aggressive n=8", Aggressive(8, rule)
    yield "conservative n=8", Conservative(8, rule)
    yield "window 5 of 8", Window(8, 5, rule)
    yield f"adaptive n=8, tolerance {TOLERANCE}", Adaptive(8, TOLERANCE, rule)


@click.command()
@click.argument("weights", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--samples", default=16, show_default=True)
@click.option("--guidance", default=2.0, show_default=True, help="Scale of classifier-free guidance.")
def main(weights: Path, samples: int, guidance: float) -> None:
    """Compare draft rules on a network of another kind than digits."""
    model, predicts = load(weights)
    labels = torch.arange(samples) % 10

    def sample(solver: Solver, mode: Mode, some: slice) -> Result:
        x = torch.cat([draw(i) for i in range(samples)[some]]) * solver.grid.start
        return run_reference(model, solver, mode, x, {"labels": labels[some], "guidance": torch.tensor(guidance)})

    def drafted(solver: Solver, mode: Mode) -> tuple[Tensor, float]:
        """Return samples and mean rounds; adaptive decides for each sample alone."""
        each = [slice(i, i + 1) for i in range(samples)] if mode.feedback else [slice(samples)]
        results = [sample(solver, mode, some) for some in each]
        return torch.cat([r.samples for r in results]), sum(r.rounds for r in results) / len(results)

    table = Table("", "rounds", *RULES, title=f"{weights.name}, {samples} samples: mean / median relative L2")
    for name, grid in grids(predicts).items():
        solver = make_solver("euler" if predicts == "flow" else "ddim", STEPS, predicts, grid)
        exact = sample(solver, Sequential(), slice(samples)).samples
        right = float((load_classifier()(exact).argmax(1) == labels).double().mean())
        table.add_row(f"{name}, sequential: {right:.0%} read as asked", str(STEPS))
        for ways in zip(*(modes(rule) for rule in RULES.values()), strict=True):
            done = [drafted(solver, mode) for _, mode in ways]
            cells = [summary(distances(x, exact)) for x, _ in done]
            rounds = "/".join(dict.fromkeys(f"{r:.3g}" for _, r in done))
            table.add_row(f"{name}, {ways[0][0]}", rounds, *(f"{c['mean']:.4f} / {c['median']:.4f}" for c in cells))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
