"""Plain: what several commands share. Errors that a user can mend, in a line; the option --trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

trace_option = click.option(
    "--trace", type=click.Path(path_type=Path), help="File for what happened where and when, which Perfetto opens."
)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Show what a user can mend as a line on stderr with exit status 1, without a traceback."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        raise click.ClickException(str(error)) from error
