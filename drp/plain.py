"""Plain: what several commands share. Errors that a user can mend, in a line; the options of traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

trace_option = click.option(
    "--trace", type=click.Path(path_type=Path), help="File for what happened where and when, which Perfetto opens."
)

trace_most_option = click.option(
    "--trace-most",
    type=click.IntRange(1),
    default=50_000,
    show_default=True,
    help="Marks that the trace keeps, the newest: so many are about 200 runs of 48 steps.",
)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Show what a user can mend as a line on stderr with exit status 1, without a traceback."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        raise click.ClickException(str(error)) from error
