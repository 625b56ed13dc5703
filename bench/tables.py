"""Tables of the documentation that commands make: each stands between two comments, one row a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "pipeline-classes.md"


def update(title: str, head: str, rows: Mapping[str, str], order: Iterable[str], page: Path = PAGE) -> dict[str, str]:
    """Put rows into the table between `<!-- title -->` and `<!-- end of title -->`; return all rows by their names.

    Rows of other names that are in `order` stay as they are: a long table can be made in parts.
    """
    begin, end = f"<!-- {title} -->\n", f"<!-- end of {title} -->\n"
    before, _, rest = page.read_text().partition(begin)
    after = rest.partition(end)[2]
    there = {**read(title, page), **rows}
    kept = {name: there[name] for name in order if name in there}
    lines = [head, "|" + "---|" * (head.count("|") - 1), *kept.values()]
    page.write_text(before + begin + "\n".join(lines) + "\n" + end + after)
    return kept


def read(title: str, page: Path = PAGE) -> dict[str, str]:
    """Return the lines of the table between `<!-- title -->` and `<!-- end of title -->` by their first cells."""
    table = page.read_text().partition(f"<!-- {title} -->\n")[2].partition(f"<!-- end of {title} -->\n")[0]
    return {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("| ")}
