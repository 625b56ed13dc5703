"""An interpreter for workers in which a module of the tests has replaced what a GPU would do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_interpreter(folder: Path, module: str) -> Path:
    """Write an executable whose processes run `python -m module` with an interpreter's arguments; return its path."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
    path.chmod(0o755)
    return path


def run_command() -> None:
    """Run the command after `-c`, as an interpreter would."""
    at = sys.argv.index("-c")
    command = sys.argv[at + 1]
    sys.argv = ["-c", *sys.argv[at + 2 :]]
    exec(command, {"__name__": "__main__"})


def make_replay(function: Callable[[], Any], output: Any) -> Callable[[], None]:
    """Return a function that writes to `output` as the replay of a captured graph does: it calls `function` again."""
    from torch.utils._pytree import tree_leaves  # only now: torch must not be imported before a device is registered

    def replay() -> None:
        for place, made in zip(tree_leaves(output), tree_leaves(function()), strict=True):
            place.copy_(made)

    return replay
