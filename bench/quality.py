"""How good are the samples? `python -m bench.quality` (`make quality`; `--full` for the figures in bench/results).

Every way of sampling `digits` in 48 steps, for n = 2, 4, 8 drafts per round, against (a) the sequential run of the same
steps and seed, and (b) what a user would do instead: fewer sequential steps, of the best solver, as many as there are
rounds. Distances are relative L2 norms, sample by sample; adaptive decides for each sample alone.

`--spreads` compares the two on several spreads of noise levels, by the distance to the solution of 1,000 steps.

An interrupted run goes on where it was: samples are kept in build/quality until the figures are written (remove them if
the code has changed), and `--samples` makes the report of as many as there are.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.figures import machine
from drp import models
from drp.sampling.drafts import DAMPED, PAPER
from drp.sampling.mode_selection import PATTERNS, TargetWindow, default_stride
from drp.sampling.modes import Adaptive, Aggressive, Conservative, Mode, Sequential, Sparse, Window
from drp.sampling.reference import Denoiser, run_reference
from drp.sampling.registry import make_solver
from training.classifier import load_classifier

RESULTS = Path(__file__).with_name("results")
KEPT = Path("build") / "quality"
STEPS = 48
SOLUTION_STEPS = 120
SOLUTION: dict[str, Any] = {"sigmas": "karras"}
"""DPM-Solver++ 2M on Karras' sigmas: 96 steps lie 0.0014 from 480, and 240 on trailing timesteps 0.0035."""
FEWER = (25, 17, 13, 11, 7)
"""Rounds of the windows and of the paper's aggressive mode."""
SPREADS: dict[str, dict[str, Any]] = {
    "trailing": {},
    "Karras": {"sigmas": "karras"},
    "Karras, rho 5": {"sigmas": "karras", "rho": 5.0},
}
CHUNK = 5
GAPS = ("tapered", "even")
TOLERANCE = 0.0025


@dataclass(frozen=True)
class Way:
    """One way of sampling."""

    name: str
    solver: str
    steps: int
    mode: Mode
    alone: bool = False  # each sample a run of its own
    grid: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Name and solver."""
        return f"{self.name}, {self.solver} {self.steps}"


def ways(solution_steps: int) -> list[Way]:
    """List all that is measured; the first is what distances are taken to, the second the solution."""
    found = [
        Way("sequential", "ddim", STEPS, Sequential()),
        Way("solution", "dpmsolver++", solution_steps, Sequential(), grid=SOLUTION),
    ]
    for n in (2, 4, 8):
        found += [
            Way(f"aggressive n={n}, paper", "ddim", STEPS, Aggressive(n, PAPER)),
            Way(f"conservative n={n}, paper", "ddim", STEPS, Conservative(n, PAPER)),
            Way(f"window n={n}", "ddim", STEPS, Window(n, default_stride(n))),
            Way(f"window n={n}", "dpmsolver++", STEPS, Window(n, default_stride(n))),
        ]
    found += [Way(f"window n=8, {name}", "ddim", STEPS, Sparse(8, 8, DAMPED, PATTERNS[name](8))) for name in GAPS]
    for n, rounds in ((4, 13), (8, 7)):
        found.append(Way(f"window n={n}, spaced", "ddim", STEPS, TargetWindow(n, rounds).for_steps(STEPS)))
    found.append(Way(f"adaptive n=8, tolerance {TOLERANCE}", "ddim", STEPS, Adaptive(8, TOLERANCE), alone=True))
    for solver, steps in (("dpmsolver++", STEPS), *(("unipc", k) for k in (STEPS, *FEWER))):
        found.append(Way("fewer steps" if steps < STEPS else "sequential", solver, steps, Sequential()))
    return found


def ways_on_spreads(solution_steps: int) -> list[Way]:
    """List what is measured of UniPC, drafted and not, on several spreads of noise levels."""
    found = [
        Way("sequential, trailing", "unipc", STEPS, Sequential()),
        Way("solution", "dpmsolver++", solution_steps, Sequential()),
    ]
    for name, grid in SPREADS.items():
        if grid:
            found.append(Way(f"sequential, {name}", "unipc", STEPS, Sequential(), False, grid))
        found += [Way(f"aggressive n={n}, {name}", "unipc", STEPS, Aggressive(n), False, grid) for n in (2, 4, 8)]
        found.append(Way(f"adaptive n=8, {name}", "unipc", STEPS, Adaptive(8, 0.005), True, grid))
        found += [Way(f"fewer steps, {name}", "unipc", k, Sequential(), False, grid) for k in (25, 13, 7)]
    return found


def draw(index: int) -> Tensor:
    """Draw sample `index`'s noise."""
    return torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(10_000 + index))


def channels_last(network: Denoiser) -> Denoiser:
    """Return a network with channels last in memory, in which it takes two thirds of the time on CPUs."""
    assert isinstance(network, torch.nn.Module)
    faster: Denoiser = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # nn lacks it
    return faster


def run(way: Way, samples: Sequence[int], guidance: float) -> tuple[Tensor, list[int], list[int]]:
    """Sample in this process; return samples [len, 1, 28, 28], and the rounds and evaluations of each."""
    torch.set_num_threads(1)
    denoiser = channels_last(models.load("digits").predict)
    solver = make_solver(way.solver, way.steps, grid=way.grid)
    parts, rounds, evaluations = [], [], []
    for group in [[i] for i in samples] if way.alone else [list(samples)]:
        cond = {"labels": torch.tensor(group) % 10, "guidance": torch.tensor(guidance)}
        result = run_reference(denoiser, solver, way.mode, torch.cat([draw(i) for i in group]), cond)
        parts.append(result.samples)
        rounds += [result.rounds] * len(group)
        evaluations += [result.evaluations] * len(group)
    return torch.cat(parts), rounds, evaluations


def run_kept(folder: Path, way: Way, samples: range, guidance: float) -> tuple[Tensor, list[int], list[int]]:
    """Return what `run` does, from a file of an interrupted run if there is one."""
    path = folder / f"{hashlib.sha256(repr((way, samples, guidance)).encode()).hexdigest()[:20]}.pt"
    if not path.exists():
        made = run(way, samples, guidance)
        torch.save(made, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    kept: tuple[Tensor, list[int], list[int]] = torch.load(path)
    return kept


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the relative L2 distance of each sample of `a` from that of `b`."""
    relative: Tensor = (a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)
    return relative


def summary(values: Tensor) -> dict[str, float]:
    """Return mean, median and maximum: one sample that becomes another digit rules the mean."""
    return {"mean": float(values.mean()), "median": float(values.median()), "max": float(values.max())}


def frechet(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of two sets of features [n, d] as Gaussians."""
    return frechet_of_moments(a.mean(0), torch.cov(a.T), b.mean(0), torch.cov(b.T))


def frechet_of_moments(mean_a: Tensor, one: Tensor, mean_b: Tensor, two: Tensor) -> float:
    """Return the Frechet distance of two Gaussians with means [d] and covariances [d, d] (Heusel et al. 2017)."""
    mean = (mean_a - mean_b).square().sum()
    # The trace of the root of a product of two covariances, by the eigenvalues of a symmetric matrix like it.
    values, vectors = torch.linalg.eigh(one)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    return float(mean + one.trace() + two.trace() - 2 * cross)


def measure(todo: Sequence[Way], count: int, guidance: float, processes: int, console: Console) -> list[dict[str, Any]]:
    """Run every way on `count` samples; return a row of figures for each."""
    chunks = [range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        KEPT.mkdir(parents=True, exist_ok=True)
        jobs = [[pool.submit(run_kept, KEPT, way, chunk, guidance) for way in todo] for chunk in chunks]
        by_chunk = []
        for chunk, futures in zip(chunks, jobs, strict=True):
            by_chunk.append([future.result() for future in futures])
            console.print(f"{chunk.stop} of {count} samples")
    done = list(zip(*by_chunk, strict=True))
    images = [torch.cat([part[0] for part in parts]) for parts in done]
    labels, classifier = torch.arange(count) % 10, load_classifier()
    features = [classifier.features(x).double() for x in images]
    rows = []
    for way, parts, x, seen in zip(todo, done, images, features, strict=True):
        rounds = torch.tensor([r for part in parts for r in part[1]], dtype=torch.float64)
        evaluations = torch.tensor([e for part in parts for e in part[2]], dtype=torch.float64)
        error = (x - images[0]).flatten(1).square().mean(dim=1)
        rows.append(
            {
                "way": way.name,
                "solver": way.solver,
                "steps": way.steps,
                "rounds": float(rounds.mean()),
                "most_rounds": int(rounds.max()),
                "evaluations": float(evaluations.mean()),
                "to_sequential": summary(distances(x, images[0])),
                "psnr": float((10 * torch.log10(4 / error.clamp(min=1e-12))).median()),
                "to_solution": summary(distances(x, images[1])),
                "frechet_to_solution": frechet(seen, features[1]),
                "accuracy": float((classifier(x).argmax(1) == labels).double().mean()),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]], count: int) -> Table:
    """Return the figures for the screen."""
    shown = Table(title=f"digits, {count} samples: relative L2 to the sequential run, and to the solution")
    for column in ("way", "solver", "rounds", "evals"):
        shown.add_column(column)
    for column in ("seq. mean", "median", "max", "PSNR", "sol. mean", "median", "max", "Frechet", "accuracy"):
        shown.add_column(column, justify="right")
    for row in rows:
        s, t = row["to_sequential"], row["to_solution"]
        shown.add_row(
            row["way"],
            f"{row['solver']} {row['steps']}",
            f"{row['rounds']:.4g}",
            f"{row['evaluations']:.4g}",
            *(f"{s[k]:.4f}" for k in ("mean", "median", "max")),
            f"{row['psnr']:.1f}",
            *(f"{t[k]:.4f}" for k in ("mean", "median", "max")),
            f"{row['frechet_to_solution']:.3f}",
            f"{row['accuracy']:.3f}",
        )
    return shown


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the figures as a table for a page."""
    lines = [
        "| way | solver, steps | rounds | to sequential: mean / median / max | PSNR, dB | "
        "to solution: mean / median / max | Frechet | accuracy |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        s, t = (" / ".join(f"{row[key][k]:.4f}" for k in ("mean", "median", "max")) for key in _DISTANCES)
        lines.append(
            f"| {row['way']} | {row['solver']} {row['steps']} | {row['rounds']:.4g} | {s} | {row['psnr']:.1f} | {t} | "
            f"{row['frechet_to_solution']:.3f} | {row['accuracy']:.3f} |"
        )
    return "\n".join(lines) + "\n"


_DISTANCES = ("to_sequential", "to_solution")


def draw_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw error over rounds, to the sequential run and to the solution."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds: dict[str, Callable[[dict[str, Any]], bool]] = {
        "aggressive, paper": lambda r: r["way"].startswith("aggressive") and r["way"].endswith("paper"),
        "conservative, paper": lambda r: r["way"].startswith("conservative") and r["way"].endswith("paper"),
        "window": lambda r: r["way"].startswith("window") and r["way"][-1].isdigit() and r["solver"] == "ddim",
        "window, tapered": lambda r: r["way"].endswith("tapered"),
        "window, spaced": lambda r: r["way"].endswith("spaced"),
        "window, even": lambda r: r["way"].endswith("even"),
        "adaptive": lambda r: r["way"].startswith("adaptive"),
        "window, DPM-Solver++ 2M": lambda r: r["way"].startswith("window") and r["solver"] == "dpmsolver++",
        "fewer steps of UniPC": lambda r: r["way"] == "fewer steps" and r["solver"] == "unipc",
    }
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    titles = ("to the sequential run of 48 DDIM steps", "to the solution")
    for axis, key, title in zip(axes, _DISTANCES, titles, strict=True):
        for name, chosen in kinds.items():
            points = sorted((r["rounds"], r[key]["median"]) for r in rows if chosen(r))
            axis.plot(*zip(*points, strict=True), marker="o", label=name, linestyle="--" if "fewer" in name else "-")
        axis.set(xlabel="rounds (evaluations one after the other)", title=f"relative L2 {title}", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("median over samples")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@click.command()
@click.option("--full", is_flag=True, help="200 samples, instead of 40.")
@click.option("--samples", type=int, help="How many samples.")
@click.option("--solution-steps", type=int, help="Steps of the solution, DPM-Solver++ 2M (on Karras' sigmas).")
@click.option("--spreads", is_flag=True, help="UniPC alone, on several spreads of noise levels.")
@click.option("--guidance", default=2.0, show_default=True, help="Scale of classifier-free guidance.")
@click.option("--processes", default=2, show_default=True, help="Processes that share the samples.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="JSON; table and picture are written beside it.")
def main(
    full: bool,
    samples: int | None,
    solution_steps: int | None,
    spreads: bool,
    guidance: float,
    processes: int,
    out: Path | None,
) -> None:
    """Measure the quality of drafted samples."""
    console, began = Console(width=170), time.perf_counter()
    count, solution = samples or (200 if full else 40), solution_steps or (1000 if spreads else SOLUTION_STEPS)
    todo = ways_on_spreads(solution) if spreads else ways(solution)
    rows = measure(todo, count, guidance, processes, console)
    console.print(table(rows, count))
    name = "quality-spreads" if spreads else "quality" if full else "quality-short"
    out = out or RESULTS / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    seconds = time.perf_counter() - began
    facts = {"samples": count, "solution_steps": solution, "guidance": guidance}
    facts["seconds"] = round(seconds)
    out.write_text(json.dumps({"machine": machine(), **facts, "rows": rows}, indent=1) + "\n")
    out.with_suffix(".md").write_text(markdown(rows))
    shutil.rmtree(KEPT)
    try:
        if not spreads:
            draw_plot(rows, out.with_suffix(".png"))
    except ImportError:
        console.print("no picture: matplotlib is missing; pip install 'drp\\[plots]'")
    console.print(f"{seconds:.0f} s in all; wrote {out}")


if __name__ == "__main__":
    main()
