"""Tables: the fields of every message as SPEC.md shows them, their types from the classes, their meaning by hand."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from typing import Any

from drp.protocol.codec import Bounds, Length

HEAD = "| field | type | meaning |\n|---|---|---|\n"
ROW = re.compile(r"^\| `(\w+)` \| (.*?) \| (.*) \|$")
TABLE = re.compile(r"(^Fields of `(\w+)`:\n\n)(?:\|.*\n|none\n)*", re.MULTILINE)


def fill(text: str, kinds: dict[str, type], versions: Mapping[str, int]) -> str:
    """Return the specification with its tables' fields and types as the classes have them; meanings stay.

    Versions are written after the names of their protocols.
    """

    def table(match: re.Match[str]) -> str:
        name = match[2]
        rows = (ROW.match(line) for line in match[0].splitlines())
        meanings = {row[1]: row[3] for row in rows if row}
        hints = typing.get_type_hints(kinds[name], include_extras=True)
        lines = [f"| `{field}` | {describe(hint)} | {meanings.get(field, '')} |\n" for field, hint in hints.items()]
        return match[1] + (HEAD + "".join(lines) if lines else "none\n")

    for protocol, version in versions.items():
        text = re.sub(rf"({protocol} protocol, version )\d+", rf"\g<1>{version}", text)
    return TABLE.sub(table, text)


def meanings(text: str) -> dict[str, dict[str, str]]:
    """Return the meanings in the specification's tables, by class and field."""
    tables: dict[str, dict[str, str]] = {}
    for match in TABLE.finditer(text):
        rows = (ROW.match(line) for line in match[0].splitlines())
        tables[match[2]] = {row[1]: row[3].strip() for row in rows if row}
    return tables


def records(kinds: dict[str, type]) -> dict[str, type]:
    """Return these classes and all that their fields are made of, by name."""
    found: dict[str, type] = {}

    def visit(hint: Any) -> None:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint.__name__ not in found:
            found[hint.__name__] = hint
            for each in typing.get_type_hints(hint, include_extras=True).values():
                visit(each)
        for each in typing.get_args(hint):
            visit(each)

    for kind in kinds.values():
        visit(kind)
    return found


def describe(hint: Any) -> str:
    """Return an annotation in the words of the specification."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint.__name__
    if hint is type(None):
        return "nil"
    if origin is typing.Annotated:
        inner, limit = arguments
        if isinstance(limit, Bounds):
            return f"{'int' if inner is int else 'float'} {_number(limit.low, inner)} to {_number(limit.high, inner)}"
        assert isinstance(limit, Length)
        if inner in (str, bytes):
            return f"{'str' if inner is str else 'bin'}, at most {limit.max}"
        return f"list, at most {limit.max}, of {describe(typing.get_args(inner)[0])}"
    if origin is typing.Literal:
        return " or ".join(f'"{word}"' for word in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(each) for each in arguments)
    return "bool"


def _number(value: float, kind: type) -> str:
    if kind is float:
        return f"{value:g}"
    whole = int(value)
    for power in (31, 48, 63):
        for low, text in ((2**power - 1, f"2^{power} - 1"), (2**power, f"2^{power}"), (-(2**power), f"-2^{power}")):
            if whole == low:
                return text
    return str(whole)
