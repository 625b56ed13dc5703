"""A process that closes what it has; in a file of its own, which imports nothing that takes long."""

from __future__ import annotations

import os
import time


def close_all() -> None:
    os.closerange(0, 256)
    time.sleep(60)
