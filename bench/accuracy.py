"""Are the digits as asked? 1,000 of them a mode, read by the classifier.

    python -m bench.accuracy

About ten minutes on 2 cores.
"""

from __future__ import annotations

import click
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from drp import Leader
from training.classifier import load_classifier

RUNS = [("sequential", 1), ("conservative", 2), ("conservative", 4), ("aggressive", 2), ("aggressive", 4)]
BATCH = 50


def draw(leader: Leader, count: int, steps: int, mode: str, drafts: int, rule: str, console: Console) -> Tensor:
    """Return `count` digits, labels 0 to 9 in turn, every batch from a seed of its own."""
    labels = [i % 10 for i in range(BATCH)]
    runs = [
        leader.submit(labels=labels, steps=steps, mode=mode, drafts=drafts, rule=rule, seed=seed)
        for seed in range(count // BATCH)
    ]
    return torch.cat([run.result().samples for run in track(runs, description=f"{mode} n={drafts}", console=console)])


@click.command()
@click.option("--count", default=1000, show_default=True, help=f"Digits of each kind, a multiple of {BATCH}.")
@click.option("--steps", default=48, show_default=True)
@click.option("--devices", default="2xcpu", show_default=True)
@click.option("--rule", default="secant", show_default=True, help="How drafts are made; paper, for the paper's.")
def main(count: int, steps: int, devices: str, rule: str) -> None:
    """Print the share of digits that the classifier reads as asked."""
    table = Table(
        "mode",
        "drafts",
        "digits",
        "read as asked",
        title=f"digits, {steps} steps, guidance of the card, drafts by {rule}",
    )
    classifier = load_classifier()
    wanted = torch.arange(count // BATCH * BATCH) % 10
    console = Console(stderr=True)
    with Leader("digits", devices=devices) as leader:
        for mode, drafts in RUNS:
            samples = draw(leader, count, steps, mode, drafts, rule, console)
            right = int((classifier(samples).argmax(1) == wanted).sum())
            table.add_row(mode, str(drafts), str(len(wanted)), f"{right / len(wanted):.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
