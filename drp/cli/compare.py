"""`drp compare`: what drafting gains and costs, as a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from drp.cli.helpers import plain_errors, print_json
from drp.cli.options import GroupedCommand, NumberRange, common_options, force_option, json_option
from drp.cli.source import make_subject, source_options
from drp.sampling.drafts import RULES
from drp.sampling.mode_selection import MODE_NAMES

INTERRUPTED = 130
"""The exit status after Ctrl-C."""


def _list(kind: type) -> Any:
    """Return a parser of comma-separated values."""

    def parse(_: click.Context, parameter: click.Parameter, text: str | None) -> list[Any] | None:
        try:
            return None if text is None else [kind(part.strip()) for part in text.split(",")]
        except ValueError:
            raise click.BadParameter(f"{text!r} is not a comma-separated list of numbers", param=parameter) from None

    return parse


@click.command(cls=GroupedCommand)
@source_options
@click.option(
    "-m",
    "--modes",
    default="window,aggressive,conservative,adaptive",
    show_default=True,
    callback=_list(str),
    help=f"Modes to compare, of {', '.join(MODE_NAMES)}.",
)
@click.option(
    "--drafts", callback=_list(int), help="Drafts per round, such as 2,4,8; by default powers of 2 up to the devices."
)
@click.option("--strides", callback=_list(float), help="Strides of mode window, in steps.")
@click.option("--tolerances", callback=_list(float), help="Tolerances of mode adaptive.")
@click.option("--rule", type=click.Choice([*RULES]), help="Draft rule; by default the one that measured best.")
@click.option("--rivals", is_flag=True, help="Also measure fewer sequential steps, of the same solver and of UniPC.")
@click.option("--seeds", type=click.IntRange(1), default=8, show_default=True, help="Samples of each setting.")
@click.option("--turns", type=click.IntRange(1), default=3, show_default=True, help="Timed calls of each setting.")
@click.option(
    "--max-distance", type=NumberRange(0, min_open=True), help="Recommend the fastest setting within this distance."
)
@click.option(
    "--min-speedup",
    type=NumberRange(0, min_open=True),
    help="Recommend the nearest setting with at least this speed-up.",
)
@click.option("--clip", help="CLIP model, a folder or a name in the hub's local cache.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    default=Path("report"),
    show_default=True,
    help="Folder of the report.",
)
@force_option
@json_option
@common_options
def compare(source: Mapping[str, Any], as_json: bool, **options: Any) -> None:
    """Compare modes and numbers of drafts with the untouched sampler, in a report with figures, pictures and advice.

    PIPELINE is digits, a diffusers pipeline's folder or hub name, or package.module:factory of a pipeline or a model.
    """
    with plain_errors():
        from drp.comparison.api import plan, run  # imports torch
        from drp.comparison.settings import check_values
        from drp.comparison.store import check_folder

        planned = ("modes", "drafts", "strides", "tolerances", "rule", "rivals")
        chosen = {name: options.pop(name) for name in planned}
        chosen |= {name: chosen[name] or () for name in ("strides", "tolerances")}
        # Before a pipeline is loaded, which may take minutes.
        check_values(chosen["modes"], chosen["drafts"] or (), chosen["strides"], chosen["tolerances"])
        check_folder(options["out"], options["force"])
        subject = make_subject(source)
        settings = plan(subject, **chosen)
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
            *(TextColumn("left"), TimeRemainingColumn()),
        )
        try:
            with Progress(*columns, console=Console(stderr=True)) as bar:
                task = bar.add_task("starting", total=None)
                comparison = run(
                    subject,
                    settings,
                    **options,
                    progress=lambda done, every, what: bar.update(task, completed=done, total=every, description=what),
                )
        except KeyboardInterrupt:
            click.echo(
                f"interrupted; {options['out'] / 'report.html'} has what is done, the same command goes on", err=True
            )
            raise SystemExit(INTERRUPTED) from None
    if as_json:
        names = ("cells", "choice", "report", "notes")
        print_json({name: getattr(comparison, name) for name in names})
        return
    Console(width=max(Console().width, 140)).print(_table(*comparison.table))
    for line in comparison.notes:
        click.echo(line)
    click.echo(comparison.choice.text)
    if comparison.choice.code:
        click.echo(f"\n    {comparison.choice.code.replace(chr(10), chr(10) + '    ')}\n")
    click.echo(f"wrote {comparison.report}")


def _table(titles: Sequence[str], *rows: Sequence[str]) -> Table:
    """Return the report's table without some columns, so that it fits into terminals."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False)
    kept = [place for place, title in enumerate(titles) if title not in ("largest", "evaluations")]
    for place in kept:
        made.add_column(titles[place], justify="left" if place == 1 else "right", no_wrap=True)
    for row in rows:
        made.add_row(*(row[place] for place in kept))
    return made
