"""Helpers of several commands: errors, parsing of numbers, and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print errors that a user can correct as one line on stderr, without a traceback, and exit with status 1."""
    try:
        yield
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        raise click.ClickException(str(error)) from error


def parse_offsets(text: str | None) -> str | tuple[int, ...] | None:
    """Parse the offsets of a window, numbers or a name."""
    return tuple(parse_numbers("offsets", text)) if text and text[0].isdecimal() else text


def parse_numbers(what: str, text: str) -> list[int]:
    """Parse a list of whole numbers such as `1,28,28`; raise ValueError for other text."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"{what} is {text!r}; write whole numbers separated by commas")
    return [int(part) for part in parts]


def print_json(value: object) -> None:
    """Print a value of dataclasses, mappings, sequences and scalars as one JSON document."""
    click.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has neither infinity nor NaN
    return value
