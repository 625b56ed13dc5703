"""Counting messages that are dropped because they are malformed or from an unknown sender."""

from __future__ import annotations

import logging


class DroppedMessages:
    """The number of dropped messages of one worker backend; few of them are logged."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self.count = 0

    def add(self, what: str) -> None:
        self.count += 1
        if self.count & (self.count - 1) == 0:  # Log the 1st, 2nd, 4th, ... only, so that a flood is not logged.
            self._log.warning("dropped: %s (%d so far)", what, self.count)
