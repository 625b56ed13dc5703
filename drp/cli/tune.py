"""`drp tune`: which mode and how many drafts are fastest here, and what other devices would change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from drp.cli.helpers import plain_errors, print_json
from drp.cli.options import GroupedCommand, common_options, json_option
from drp.cli.source import make_subject, source_options

if TYPE_CHECKING:
    from drp.comparison.tuning import Tuning

MAX_ROWS = 12


@click.command(cls=GroupedCommand)
@source_options
@json_option
@common_options
def tune(source: Mapping[str, Any], as_json: bool) -> None:
    """Predict the time of every mode and number of drafts of PIPELINE from a few runs, and try the best of each mode.

    PIPELINE is digits, a diffusers pipeline's folder or hub name, or package.module:factory of a pipeline or a model.
    """
    with plain_errors():
        subject = make_subject(source)
        from drp.comparison.tuning import tune as measure

        console = Console(stderr=True)
        with console.status("starting") as status:
            tuning = measure(subject, status.update)
    if as_json:
        print_json(tuning)
        return
    Console(width=max(Console().width, 100)).print(*tables(tuning))
    for line in [*tuning.method, *tuning.advice]:
        click.echo(line)
    click.echo(f"\n    {tuning.code.replace(chr(10), chr(10) + '    ')}\n")


def tables(tuning: Tuning) -> list[Table]:
    """Return tables of the measurements, the predictions, and other numbers of devices."""
    return [*_measured(tuning), _settings(tuning), _devices(tuning)]


def _table(title: str, *columns: str) -> Table:
    """Return a table with a first column of text and further columns of numbers."""
    made = Table(title=title, title_justify="left")
    for place, column in enumerate(columns):
        made.add_column(column, no_wrap=True, justify="right" if place else "left")
    return made


def _measured(tuning: Tuning) -> list[Table]:
    found = tuning.calibration
    facts = Table(title="Measured", show_header=False, title_justify="left")
    facts.add_row("untouched run", f"{found.untouched * 1e3:.1f} ms")
    for size, seconds in found.batches.items():
        facts.add_row(f"a batch of {size} on each device", f"{seconds * 1e3:.2f} ms")
    by_name: dict[str, list[float]] = {}
    for device, used in found.memory.items():
        by_name.setdefault(device.partition(": ")[2], []).append(used / 2**20)
    for name, sizes in by_name.items():
        least, most = f"{min(sizes):,.0f}", f"{max(sizes):,.0f}"
        facts.add_row(
            f"memory, {len(sizes)} x {name}" if len(sizes) > 1 else f"memory, {name}",
            f"{least} MiB" if least == most else f"{least} to {most} MiB",
        )
    rounds = _table("Rounds", "drafts, one per device", "slowest evaluation, ms", "rest of the round, ms")
    for width, took in found.rounds.items():
        rounds.add_row(str(width), f"{took.slowest * 1e3:.2f}", f"{took.loss * 1e3:.2f}")
    return [facts, rounds]


def _settings(tuning: Tuning) -> Table:
    columns = ["setting", "rounds", "predicted, ms", "measured, ms", "off by", "times as fast", "distance"]
    settings = _table("Settings, the fastest first", *columns)
    for c in tuning.candidates[:MAX_ROWS] + [c for c in tuning.candidates[MAX_ROWS:] if c.measured is not None]:
        label = c.setting.label if c.batch == 1 else f"{c.setting.label}, {c.batch} a device"
        row = [label, str(c.rounds), f"{c.predicted * 1e3:.1f}"]
        if c.measured is not None:
            row += [f"{c.measured * 1e3:.1f}", f"{c.error:+.1%}", f"{c.speedup:.2f}", f"{c.distance:.4f}"]
        settings.add_row(*row)
    return settings


def _devices(tuning: Tuning) -> Table:
    devices = _table("Other numbers of devices", "devices", "window, predicted, ms")
    for count, predicted in tuning.devices:
        devices.add_row(str(count), f"{predicted * 1e3:.1f}")
    return devices
