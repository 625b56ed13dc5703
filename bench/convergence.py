"""Convergence: whether drafted samples come nearer to the sequential ones as steps become shorter, by scheduler.

python -m bench.convergence [NAMES] prints the table of docs/pipeline-classes.md; with --write it puts the rows there,
where those of other schedulers stay. The sample is a digit of the trained model, drafted two steps at a time, from 24
steps to 192. With schedulers of flow matching, whose models predict a velocity, the model's noise prediction is
turned into that.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from torch import Tensor

from bench.tables import update
from drp.diffusers import reference
from drp.diffusers.digits import digits_pipeline
from tests.tiny.schedulers import SCHEDULERS, Velocity

STEPS = (24, 48, 96, 192)
ENOUGH = 0.75
"""The factor by which each doubling of the steps must shrink the distance, on average."""
HEAD = f"| scheduler | distance at {', '.join(map(str, STEPS))} steps | drafted |"


def pipeline(name: str) -> Any:
    """Return the digits with a scheduler."""
    pipe = digits_pipeline()
    if name.startswith("flow"):
        pipe.unet = Velocity(pipe.unet, pipe.scheduler.alphas_cumprod).eval()
    pipe.scheduler = SCHEDULERS[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, steps: int) -> Tensor:
    """Return a digit."""
    torch.manual_seed(0)
    images: Tensor = pipe([3], steps, generator=torch.Generator().manual_seed(0)).images
    return images


def measure(name: str, steps: tuple[int, ...] = STEPS) -> tuple[list[float], str]:
    """Return the relative distances of drafted samples to sequential ones, and why drafts are refused by default."""
    pipe, distances, reason = pipeline(name), [], ""
    for count in steps:
        wanted = sample(pipe, count)
        with reference(pipe, devices=2, mode="aggressive", always_draft=True):
            distances.append(float((sample(pipe, count) - wanted).norm() / wanted.norm()))
    with reference(pipe, devices=2) as parallel:
        sample(pipe, steps[0])
    reason = parallel.report.calls[0].sequential.partition("; always_draft")[0]
    return distances, reason


def converges(distances: list[float]) -> bool:
    """Return whether distances shrink as they should; those that are nothing but rounding do."""
    return distances[-1] < 1e-5 or (distances[-1] / distances[0]) ** (1 / (len(distances) - 1)) < ENOUGH


def row(name: str, distances: list[float], reason: str) -> str:
    """Return the row of the table."""
    return f"| {name} | {', '.join(f'{d:.2g}' for d in distances)} | {'no: sequential' if reason else 'yes'} |"


def main() -> None:
    """Print the table, and perhaps put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="schedulers (all)")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/pipeline-classes.md")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in SCHEDULERS]
    if unknown:
        parser.error(f"{unknown[0]!r} is no scheduler here; there are {'; '.join(SCHEDULERS)}")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in options.names or SCHEDULERS:
        distances, reason = measure(name)
        if converges(distances) == bool(reason):
            print(f"{name}: converges is {converges(distances)}, and it is refused because {reason or 'of nothing'}")
        print(row(name, distances, reason), flush=True)
        if options.write:
            update("convergence", HEAD, {name: row(name, distances, reason)}, SCHEDULERS)


if __name__ == "__main__":
    main()
