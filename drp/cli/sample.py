"""`drp sample`: one sampling run, written to a file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from drp.cli.helpers import parse_numbers, parse_offsets, plain_errors, print_json
from drp.cli.leader_options import POSITIVE, leader_options, make_leader_options
from drp.cli.options import GroupedCommand, NumberRange, common_options, force_option, json_option, trace_option
from drp.cli.output import check_file, check_output, check_shape, default_output, write_samples
from drp.cli.pipeline import pipeline_options
from drp.pipelines import check_module
from drp.sampling.drafts import RULES
from drp.sampling.mode_selection import DEFAULT_TOLERANCE, MODE_NAMES, PATTERNS
from drp.sampling.options import RunOptions
from drp.sampling.predictions import PREDICTION_TYPES
from drp.sampling.registry import SOLVER_NAMES, make_solver

if TYPE_CHECKING:
    from drp.leader.request import RequestArguments
    from drp.sampling.result import Result


def parse_labels(text: str) -> list[int]:
    """Parse labels such as `3,1,4` or `0-9`; empty text means none."""
    labels: list[int] = []
    for part in text.split(",") if text else ():
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"labels {text!r}: {part!r} is not a label; write them as 3,1,4 or 0-9")
        low, high = int(first), int(last or first)
        if high < low or high - low > 100_000:
            raise ValueError(f"labels {text!r}: {part!r} is not a range; write the smaller number first")
        labels.extend(range(low, high + 1))
    return labels


@click.command(cls=GroupedCommand)
@click.argument("model", default="digits")
@click.option("-l", "--labels", help="Classes, one per column: 3,1,4 or 0-9; by default all classes of the model.")
@click.option("-r", "--rows", type=POSITIVE, default=1, show_default=True, help="Samples per label, one per row.")
@click.option("--shape", help="Shape of a sample, such as 1,28,28, for a model that does not define it.")
@click.option("-n", "--steps", type=POSITIVE, default=48, show_default=True, help="Steps of the solver.")
@leader_options
@click.option("-m", "--mode", type=click.Choice(MODE_NAMES), default="window", show_default=True)
@click.option("--drafts", type=POSITIVE, help="Drafts per round; by default as many as the devices evaluate at once.")
@click.option(
    "--target-speedup",
    type=NumberRange(1),
    help="Choose a window with this ratio of steps to rounds and at most --drafts.",
)
@click.option("--target-rounds", type=POSITIVE, help="Choose a window with this number of rounds and at most --drafts.")
@click.option(
    "--stride",
    type=NumberRange(1),
    help="Steps by which mode window advances; by default n / 2 + 1, or (n + 1) / 2 if the solver adds noise.",
)
@click.option(
    "--offsets", help=f"Steps ahead of the drafts in mode window: {', '.join(PATTERNS)}, or 1,2,3,4,6,8,10,12."
)
@click.option("--rule", type=click.Choice([*RULES]), help="Draft rule; by default the one that measured best.")
@click.option(
    "--tolerance",
    type=NumberRange(0),
    default=DEFAULT_TOLERANCE,
    show_default=True,
    help="Relative residual above which mode adaptive discards predictions.",
)
@click.option("--warmup", type=click.IntRange(0), default=0, show_default=True, help="Sequential steps at the start.")
@click.option(
    "--sweeps", type=click.IntRange(0), default=0, show_default=True, help="Extra evaluations of each block of drafts."
)
@click.option("--solver", type=click.Choice(SOLVER_NAMES), default="ddim", show_default=True)
@click.option("--order", type=POSITIVE, help="Order of a multistep solver.")
@click.option("--eta", type=NumberRange(0, 1), help="Noise that ddim adds, 0 to 1.")
@click.option("--spacing", type=click.Choice(["trailing", "leading", "linspace"]), help="Spacing of the timesteps.")
@click.option("--sigmas", type=click.Choice(["karras", "exponential", "beta"]), help="Spacing of the noise levels.")
@click.option("--shift", type=NumberRange(0, min_open=True), help="Shift of a flow-matching grid.")
@click.option(
    "--prediction-type",
    type=click.Choice(PREDICTION_TYPES),
    default="epsilon",
    show_default=True,
    help="What the model predicts.",
)
@click.option("--guidance", type=float, help="Scale of classifier-free guidance; by default the model's.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the noise.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Output file, .png, .npy or .safetensors; by default samples.png, or samples.safetensors if samples are not "
    "pictures.",
)
@force_option
@json_option
@trace_option
@common_options
@pipeline_options
def sample(model: str, **options: Any) -> None:
    """Sample from MODEL: digits, or package.module:factory of your own, which may be in the working directory."""
    with plain_errors():
        if options["out"] is not None:
            check_output(options["out"], options["force"])
        if options["trace"] is not None:
            check_file(options["trace"], options["force"])
        _sample(model, options)


def _sample(model: str, given: Mapping[str, Any]) -> None:
    """Check every option, start workers, sample, and write the samples."""
    from drp.api import check_options  # Imported here, so that --help does not import torch.
    from drp.leader.leader import Leader
    from drp.models import describe
    from drp.trace.record import record

    known = describe(model)
    check_module(model)
    labels = given["labels"]
    columns = list(range(known.classes or 0)) if known and labels is None else parse_labels(labels or "")
    chosen = make_leader_options(given)
    options = _run_options(given, columns)
    check_options(model, chosen.drafts, cast("RequestArguments", options))
    shape = options["shape"] or (known.sample_shape if known else None)
    out: Path | None = given["out"]
    if shape is not None:
        out = _output(out, shape, given["force"])
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    with bar:
        solver = options["solver"], options["steps"], options["prediction_type"]
        total = make_solver(*solver, options["grid"], options["solver_options"]).grid.steps  # Heun's grid has more.
        devices = chosen.worker_devices
        names = ", ".join(device.name for device in devices)
        progress = bar.add_task(f"starting {len(devices)} worker(s) on {names}", total=total)

        def advance(step: int, state: object) -> None:
            bar.update(progress, completed=step, description="sampling")

        with Leader(model, chosen) as leader:
            if shape is None:  # It is known once the model is loaded.
                shape = leader.spec.sample_shape or ()
                out = _output(out, shape, given["force"])
            assert out is not None
            with record(leader, given["trace"]) if given["trace"] is not None else nullcontext():
                result = leader.sample(**options, callback=advance)
    write_samples(result.samples, max(len(columns), 1), out)
    _report(result, out, given["as_json"])


def _output(out: Path | None, shape: Any, force: bool) -> Path:
    """Return the output file; raise ValueError if samples of this shape cannot be written to it."""
    if out is None:
        out = default_output(shape)
        check_output(out, force)
    check_shape(out, shape)
    return out


def _run_options(given: Mapping[str, Any], columns: list[int]) -> dict[str, Any]:
    """Return the options of the run, as `drp.sample` takes them."""
    return {name: given[name] for name in ("mode", "solver", *RunOptions.__annotations__) if name in given} | {
        "offsets": parse_offsets(given["offsets"]),
        "labels": columns * given["rows"] or None,
        "count": max(len(columns), 1) * given["rows"],
        "shape": parse_numbers("shape", given["shape"]) if given["shape"] else None,
        "solver_options": _without_none(given, "order", "eta"),
        "grid": _without_none(given, "spacing", "sigmas", "shift"),
    }


def _without_none(given: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: given[name] for name in names if given[name] is not None}


def _report(result: Result, out: Path, as_json: bool) -> None:
    for incident in result.incidents:
        click.echo(f"meanwhile {incident.splitlines()[0]}", err=True)
    if as_json:
        names = (
            *("mode", "drafts", "steps", "devices", "dispatch", "rounds", "evaluations", "seconds", "device_seconds"),
            *("speedup", "theory", "residuals", "cuts", "evaluated", "incidents"),
        )
        print_json({name: getattr(result, name) for name in names} | {"out": out})
        return
    measured = f"{result.speedup:.2f} of " if result.device_seconds else ""  # GPUs may report no times.
    click.echo(
        f"{result.mode}, {len(result.devices)} worker(s) on {', '.join(result.devices)}: {result.steps} steps in "
        f"{result.rounds} rounds, {result.evaluations} evaluations, {result.seconds:.2f} s; speed-up "
        f"{measured}{result.theory:.2f} in theory"
    )
    click.echo(f"wrote {out}")
