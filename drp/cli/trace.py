"""`drp trace`: summaries of recorded runs."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from drp.cli.helpers import plain_errors, print_json
from drp.cli.options import json_option


@click.group()
def trace() -> None:
    """Summarize traces written with --trace."""


@trace.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@json_option
def summary(path: Path, as_json: bool) -> None:
    """Print how the runs in PATH spent their time: computing, in transfer, waiting for the slowest device, idle."""
    with plain_errors():
        from drp.trace import read, summarise
        from drp.trace.tables import tables

        found = summarise(*read(path))
        if as_json:
            print_json(found)
            return
        click.echo(found.text)
        Console(width=max(Console().width, 110)).print(*tables(found))
