"""The command line: `drp sample`, `drp trace`, and the commands of the server and of the simulator."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from drp import __version__
from drp.cli_pipeline import pipeline_options
from drp.http.command import http
from drp.plain import check_writable, parse_numbers, plain_errors, trace_option
from drp.sampling.drafts import RULES
from drp.sampling.modes import MODE_NAMES
from drp.sampling.named import SOLVER_NAMES, make_solver
from drp.server.command import keys, serve, status
from drp.simulate.command import simulate


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="drp")
def main() -> None:
    """Run diffusion sampling faster, by drafting timesteps on several devices and refining them."""


for command in (serve, keys, status, http, simulate):
    main.add_command(command)


def parse_labels(text: str) -> list[int]:
    """Return the labels that text such as `3,1,4` or `0-9` names, none if it is empty."""
    labels: list[int] = []
    for part in text.split(",") if text else ():
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"labels {text!r}: {part!r} is no label; write them as 3,1,4 or 0-9")
        low, high = int(first), int(last or first)
        if high < low or high - low > 100_000:
            raise ValueError(f"labels {text!r}: {part!r} is no range; write the smaller number first")
        labels.extend(range(low, high + 1))
    return labels


@main.command()
@click.argument("model", default="digits")
@click.option("-l", "--labels", help="Classes, a column each: 3,1,4 or 0-9; by default all that the model has.")
@click.option("-r", "--rows", default=1, show_default=True, help="Rows of the picture: samples of each label.")
@click.option("--shape", help="A sample's shape, 1,28,28, for a model that does not say it.")
@click.option("-n", "--steps", default=48, show_default=True, help="Steps of the solver.")
@click.option(
    "-d", "--devices", default="1", show_default=True, help="A count, or names: cpu:0,cpu:1 or 8xemulated:20ms."
)
@click.option("-m", "--mode", default="aggressive", show_default=True, help=f"One of {', '.join(MODE_NAMES)}.")
@click.option("--drafts", type=int, help="Drafts a round; by default as many as the devices evaluate at once.")
@click.option("--drafts-per-device", default=1, show_default=True, help="Drafts that a device evaluates as one batch.")
@click.option("--target-speedup", type=float, help="Choose mode and drafts for this, with at most --drafts.")
@click.option("--rule", help=f"How drafts are made: {', '.join(RULES)}; by default the best measured.")
@click.option("--tolerance", default=0.0025, show_default=True, help="Residual at which adaptive gives predictions up.")
@click.option("--warmup", default=0, show_default=True, help="Steps taken sequentially first.")
@click.option("--sweeps", default=0, show_default=True, help="Times more that each block of drafts is evaluated.")
@click.option("--solver", default="ddim", show_default=True, help=f"One of {', '.join(SOLVER_NAMES)}.")
@click.option("--order", type=int, help="Order of a multistep solver.")
@click.option("--eta", type=float, help="Noise that ddim adds, 0 to 1.")
@click.option("--spacing", help="Of the timesteps: trailing, leading or linspace.")
@click.option("--sigmas", help="Noise levels: karras, exponential or beta.")
@click.option("--shift", type=float, help="Of a flow-matching grid.")
@click.option("--prediction-type", default="epsilon", show_default=True, help="Of the model: epsilon, v, sample, flow.")
@click.option("--threads", default=1, show_default=True, help="Threads of each worker.")
@click.option("--guidance", type=float, help="Scale of classifier-free guidance; by default the model's.")
@click.option("--seed", default=0, show_default=True, help="Seed of the noise.")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("samples.png"), show_default=True)
@trace_option
@pipeline_options
def sample(
    model: str,
    labels: str | None,
    rows: int,
    shape: str | None,
    steps: int,
    devices: str,
    mode: str,
    drafts: int | None,
    drafts_per_device: int,
    target_speedup: float | None,
    rule: str | None,
    tolerance: float,
    warmup: int,
    sweeps: int,
    solver: str,
    order: int | None,
    eta: float | None,
    spacing: str | None,
    sigmas: str | None,
    shift: float | None,
    prediction_type: str,
    threads: int,
    guidance: float | None,
    seed: int,
    out: Path,
    trace: Path | None,
) -> None:
    """Draw samples of MODEL into one picture, a label a column."""
    with plain_errors():
        check_writable(out)
        if rows < 1:
            raise ValueError(f"rows is {rows}; a picture has 1 or more")
        from torch import Tensor  # only now: --help need not wait for torch

        from drp.api import sample as run
        from drp.models import describe
        from drp.pictures import save_grid

        known = describe(model)
        columns = list(range(known.classes or 0)) if known and labels is None else parse_labels(labels or "")
        options, grid = _given(order=order, eta=eta), _given(spacing=spacing, sigmas=sigmas, shift=shift)
        total = make_solver(solver, steps, prediction_type, grid, options).grid.steps  # Heun's has more than `steps`
        console = Console(stderr=True)
        bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        with bar:
            progress = bar.add_task("starting workers", total=total)

            def advance(step: int, state: Tensor) -> None:
                bar.update(progress, completed=step, description="sampling")

            result = run(
                model,
                labels=columns * rows or None,
                count=max(len(columns), 1) * rows,
                shape=parse_numbers("shape", shape) if shape else None,
                steps=steps,
                devices=devices,
                mode=mode,
                drafts=drafts,
                drafts_per_device=drafts_per_device,
                target_speedup=target_speedup,
                rule=rule,
                tolerance=tolerance,
                warmup=warmup,
                sweeps=sweeps,
                solver=solver,
                solver_options=options,
                grid=grid,
                prediction_type=prediction_type,
                threads=threads,
                guidance=guidance,
                seed=seed,
                callback=advance,
                trace=trace,
            )
        save_grid(result.samples, max(len(columns), 1), out)
        click.echo(
            f"{result.mode}, {len(result.devices)} worker(s) on {', '.join(result.devices)}: {result.steps} steps in "
            f"{result.rounds} rounds, {result.evaluations} evaluations, {result.seconds:.2f} s; speed-up "
            f"{result.speedup:.2f} of {result.theory:.2f} in theory"
        )
        for incident in result.incidents:
            click.echo(f"meanwhile {incident.splitlines()[0]}", err=True)
        click.echo(f"wrote {out}")


@main.command()
def doctor() -> None:
    """Show what this machine has, what of it works, and what drp will use; end with 1 if something is in the way."""
    from drp.doctor import examine
    from drp.doctor_tables import tables

    report = examine()
    Console(width=max(Console().width, 110)).print(*tables(report))
    for finding in report.bad:
        click.echo(f"in the way: {finding.about}: {finding.remedy}", err=True)
    if report.bad:
        raise SystemExit(1)


@main.group()
def trace() -> None:
    """Look at what --trace has written."""


@trace.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def summary(path: Path) -> None:
    """Say where the time of the runs in PATH went: computing, transfer, the slowest device, the leader, idle."""
    with plain_errors():
        from drp.trace import read, summarise
        from drp.trace.tables import tables

        found = summarise(*read(path))
        click.echo(found.words)
        Console(width=max(Console().width, 110)).print(*tables(found))


def _given(**options: float | str | None) -> dict[str, float | str]:
    """Leave out what was not given."""
    return {name: value for name, value in options.items() if value is not None}
