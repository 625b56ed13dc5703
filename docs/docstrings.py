"""For the API pages: docstrings list arguments as `name: what it is`, a line each; in Markdown that is a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

ITEM = re.compile(r"^([a-z_]\w*(?:, [a-z_]\w*)*): (?=\S)")


class ArgumentLists(griffe.Extension):
    """Write those lines as list items."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = as_lists(obj.docstring.value)


def as_lists(text: str) -> str:
    """Return the text with each `name: what it is` as a list item, and examples in code blocks."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        found = ITEM.match(line)
        if found:
            if not inside and lines and lines[-1]:
                lines.append("")
            names = ", ".join(f"`{name}`" for name in found[1].split(", "))
            lines.append(f"- {names}: {line[found.end() :]}")
            inside = True
        else:
            inside = inside and bool(line)
            lines.append(line)
    return "\n".join(lines)
