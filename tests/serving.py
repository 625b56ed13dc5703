"""`drp serve` as a process, and a server in a thread of the test."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drp import Leader
from drp.server.server import Server

ROOT = Path(__file__).parents[1]
DEADLINE = 20.0
LONG: dict[str, Any] = {"steps": 900, "sweeps": 50}
"""Options of a run that lasts until it is cancelled."""


class Served:
    """`drp serve` as a process, and where it listens."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self.address = folder, f"ipc://{folder}/server/socket"
        command = [str(Path(sys.executable).with_name("drp")), "serve", "tests.denoisers:Tiny", "-l", self.address]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [*command, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
        )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        self.idle = self.memory()

    def memory(self) -> int:
        """Count its descriptors of shared memory: of workers and results, not of runs, whose memory is used again."""
        return sum("memfd:drp " in target for target in self._descriptors())

    def descriptors(self) -> int:
        """Count all others too, but those of runs: as many are kept as there were at once."""
        return sum("memfd:drp-run" not in target for target in self._descriptors())

    def _descriptors(self) -> list[str]:
        found = []
        for path in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(str(path.readlink()))
        return found

    def end(self) -> tuple[int, str]:
        """Ask it to end; return how it did, and what it wrote to stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, errors


@contextlib.contextmanager
def serving(leader: Leader, folder: Path, **options: Any) -> Iterator[Server]:
    """Run a server in a thread; what it raises, it raises here."""
    options.setdefault("address", f"ipc://{folder}/server/socket")
    server = Server(leader, "model", **options)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield server
    finally:
        server.drain(0.0)
        thread.join(DEADLINE)
        assert not thread.is_alive()
        server.close()
    if errors:
        raise errors[0]
