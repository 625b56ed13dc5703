"""`drp doctor`: what this machine has, and what of it works."""

from __future__ import annotations

import click
from rich.console import Console

from drp.cli.helpers import print_json
from drp.cli.options import json_option, verbose_option


@click.command()
@json_option
@verbose_option
def doctor(as_json: bool) -> None:
    """Show what this machine has, what of it works, and what drp will use; end with 1 if something is in the way."""
    from drp.cli.doctor_tables import tables  # imports torch
    from drp.doctor import examine

    report = examine()
    if as_json:
        print_json(report)
    else:
        Console(width=max(Console().width, 110)).print(*tables(report))
    for finding in report.bad:
        click.echo(f"in the way: {finding.about}: {finding.remedy}", err=True)
    if report.bad:
        raise SystemExit(1)
