"""`drp trace`: where the time of recorded runs went."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from drp.cli.helpers import plain_errors, print_json
from drp.cli.options import json_option


@click.group()
def trace() -> None:
    """Look at what --trace has written."""


@trace.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@json_option
def summary(path: Path, as_json: bool) -> None:
    """Say where the time of the runs in PATH went: computing, transfer, the slowest device, the leader, idle."""
    with plain_errors():
        from drp.trace import read, summarise
        from drp.trace.tables import tables

        found = summarise(*read(path))
        if as_json:
            print_json(found)
            return
        click.echo(found.text)
        Console(width=max(Console().width, 110)).print(*tables(found))
