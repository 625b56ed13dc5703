"""Tables of what the doctor found, for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from drp.doctor import Report

MARKS = {"": "", "good": "[green]yes[/]", "bad": "[red]NO[/]"}


def tables(report: Report) -> Iterator[Table]:
    """Yield a table for each section, and the matrix of copies between GPUs if there are any."""
    for title, findings in report.sections.items():
        table = Table(title=title, title_justify="left", show_header=False, expand=False)
        for finding in findings:
            remedy = f"\n{escape(finding.remedy)}" if finding.remedy else ""
            table.add_row(escape(finding.about), MARKS[finding.state], escape(finding.seen) + remedy)
        yield table
    if report.gpus:
        matrix = Table("from \\ to", *(f"cuda:{gpu.index}" for gpu in report.gpus), title="copies between GPUs, tried")
        for gpu, row in zip(report.gpus, report.peers, strict=True):
            matrix.add_row(f"cuda:{gpu.index}", *map(escape, row))
        yield matrix
