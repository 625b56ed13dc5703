"""`drp serve` as a process, for tests of those who come to its door."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parent.parent
DEADLINE = 60.0


class Served:
    """A server of the tiny denoiser, at `address`; at the end it is drained, and must have had no complaint."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.address = f"ipc://{folder}/door/socket"
        command = [str(Path(sys.executable).with_name("drp")), "serve", "tests.denoisers:Tiny", "-l", self.address]
        self.process = subprocess.Popen(
            [*command, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )

    def __enter__(self) -> Served:
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert self.address in first, first
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.terminate()
        try:
            _, errors = self.process.communicate(timeout=DEADLINE)
        finally:
            self.process.kill()
        assert (self.process.returncode, errors) == (0, "")
