"""Plain errors: what a user of the command line can mend, in a line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click


@contextmanager
def plain_errors() -> Iterator[None]:
    """Show what a user can mend as a line on stderr with exit status 1, without a traceback."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        raise click.ClickException(str(error)) from error
