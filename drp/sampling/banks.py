"""Banks: groups of rows of a matrix, handed out again once nothing in use lies in them."""

from __future__ import annotations

from collections.abc import Iterable


class Banks:
    """`count` groups of `width` rows each, one after the other."""

    def __init__(self, count: int, width: int) -> None:
        self.count, self.width = count, width

    @property
    def rows(self) -> int:
        """The rows of all groups."""
        return self.count * self.width

    def take(self, rows: int, used: Iterable[int]) -> int:
        """Return the first row of a group that holds none of the rows `used`, for `rows` rows.

        Raises ValueError if there is none: a mode of somebody's own keeps predictions for longer than was foreseen.
        """
        busy = {row // self.width for row in used}
        wanted = 1 if self.width > 1 else rows  # groups of a single row are taken several in a row
        free, run = None, 0
        for bank in range(self.count):
            run = 0 if bank in busy else run + 1
            if run == wanted:
                free = bank + 1 - wanted
                break
        if free is None or rows > self.width * wanted:
            raise ValueError(
                f"the mode needs {rows} rows beside those of {len(busy)} rounds, and there are {self.count} groups of "
                f"{self.width}; its rounds must advance sooner, or its width be larger"
            )
        return free * self.width
