"""An allocator of groups of rows of a matrix, which are reused once no row in them is in use."""

from __future__ import annotations

from collections.abc import Iterable


class SlotAllocator:
    """`count` groups of `width` rows each, one after the other."""

    def __init__(self, count: int, width: int) -> None:
        self.count, self.width = count, width

    @property
    def rows(self) -> int:
        """The rows of all groups."""
        return self.count * self.width

    def allocate(self, rows: int, used: Iterable[int]) -> int:
        """Return the first row of a group that holds none of the rows `used`, for `rows` rows.

        Raises ValueError if there is none: a mode of somebody's own keeps predictions for longer than was foreseen.
        """
        used = list(used)
        first = self.find(rows, used)
        if first is None:
            busy = len({row // self.width for row in used})
            raise ValueError(
                f"the mode needs {rows} rows beside those of {busy} rounds, and there are {self.count} groups of "
                f"{self.width}; its rounds must advance sooner, or its width be larger"
            )
        return first

    def find(self, rows: int, used: Iterable[int]) -> int | None:
        """Return the same, or None."""
        busy = {row // self.width for row in used}
        wanted = 1 if self.width > 1 else rows  # groups of a single row are taken several in a row
        run = 0
        for bank in range(self.count):
            run = 0 if bank in busy else run + 1
            if run == wanted:
                return (bank + 1 - wanted) * self.width if rows <= self.width * wanted else None
        return None
