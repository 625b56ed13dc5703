"""The tables that `drp doctor` prints."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from drp.doctor import DoctorReport

MARKS = {"": "", "good": "[green]yes[/]", "bad": "[red]NO[/]"}


def tables(report: DoctorReport) -> Iterator[Table]:
    """Yield a table for each section, and if there are GPUs one for each kind of access between them."""
    for title, findings in report.sections.items():
        table = Table(title=title, title_justify="left", show_header=False, expand=False)
        for finding in findings:
            remedy = f"\n{escape(finding.remedy)}" if finding.remedy else ""
            table.add_row(escape(finding.about), MARKS[finding.state], escape(finding.seen) + remedy)
        yield table
    titles = {"copies between GPUs, tried": report.peers, "CUDA IPC between two processes, tried": report.ipc}
    for title, rows in titles.items() if report.gpus else ():
        matrix = Table("from \\ to", *(f"cuda:{gpu.index}" for gpu in report.gpus), title=title, title_justify="left")
        for gpu, row in zip(report.gpus, rows, strict=True):
            matrix.add_row(f"cuda:{gpu.index}", *map(escape, row))
        yield matrix
