"""Plain: what several commands share. Errors that a user can mend, in a line; options of traces; numbers and files."""

from __future__ import annotations

import os
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


def parse_numbers(what: str, text: str) -> list[int]:
    """Return the whole numbers that text such as `1,28,28` lists; raise ValueError if it is anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{what} is {text!r}; write whole numbers with commas between")
    return [int(part) for part in parts]


def check_writable(path: Path) -> None:
    """Raise ValueError if no picture can be written to `path`."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} does not end in .png; pictures are written as PNG")
    if path.is_dir():
        raise ValueError(f"{path} cannot be written: it is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: permission denied")
