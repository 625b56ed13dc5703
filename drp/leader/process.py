"""Process: a worker's interpreter as the leader starts it and sees it.

multiprocessing is not used for this: its spawn fixes the start method of the whole program, leaves a resource tracker
behind, knows one interpreter for all (in an embedding program the wrong one), and runs the main script again.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import spawn
from pathlib import Path
from typing import Any

BOOT = "import sys; sys.path[:] = sys.argv[2:]; from {entry} import start; start(sys.argv[1])"

FLAGS = {"isolated": "-I", "ignore_environment": "-E", "no_user_site": "-s", "dont_write_bytecode": "-B"}
"""By name in sys.flags: what says where an interpreter looks for modules and leaves its files."""


def find_interpreter(python: str | os.PathLike[str] | None = None) -> str:
    """Return the path of the interpreter for the workers; raise ValueError if there is none.

    It is `python` if that is given, else what `multiprocessing.set_executable` was told, else this program, if it is an
    interpreter. In a program that embeds one it is not: then the one in this environment's folder.
    """
    if python is not None:
        if not os.access(python, os.X_OK) or Path(python).is_dir():
            raise ValueError(f"python is {os.fspath(python)!r}, which cannot be run; give the path of an interpreter")
        return os.fspath(python)
    told = os.fsdecode(spawn.get_executable() or "")
    if re.fullmatch(r"(python|pypy)[\d.]*[dt]?", Path(told).name) and os.access(told, os.X_OK):
        return told
    version = "{}.{}".format(*sys.version_info)
    for prefix in (sys.prefix, sys.exec_prefix, sys.base_exec_prefix):
        for name in (f"python{version}", "python3", "python"):
            path = Path(prefix, "bin", name)
            if os.access(path, os.X_OK):
                return str(path)
    raise ValueError(
        f"no interpreter for the workers: {told!r} is none, and {sys.prefix}/bin has none; give its path as python="
    )


class Process:
    """One process, that runs `start` of the module `entry` in a fresh interpreter, with `config` as JSON.

    It has this process's module path, working directory and environment. `config` gets an item more, `lifeline`: a
    descriptor that is readable once this process is gone. `sentinel` is readable once the other is.
    """

    def __init__(self, python: str, entry: str, config: Mapping[str, Any]) -> None:
        flags = [flag for name, flag in FLAGS.items() if getattr(sys.flags, name)]
        flags += [f"-W{option}" for option in sys.warnoptions]
        path = [os.path.abspath(folder) for folder in sys.path]  # noqa: PTH100  # "" is the working directory
        self._ours, theirs = socket.socketpair()
        with theirs:
            told = json.dumps({**config, "lifeline": theirs.fileno()})
            try:
                self._popen = subprocess.Popen(  # noqa: S603  # the interpreter is this program's, or its user's choice
                    [python, *flags, "-c", BOOT.format(entry=entry), told, *path],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                )
            except BaseException:
                self._ours.close()
                raise
        self.pid = self._popen.pid

    @property
    def sentinel(self) -> int:
        """A descriptor that is readable once the process is gone."""
        return self._ours.fileno()

    @property
    def exitcode(self) -> int | None:
        """Its exit code, minus the signal that ended it, or None while it runs."""
        return self._popen.poll()

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.exitcode is None

    def join(self, seconds: float) -> None:
        """Wait for its end, at most."""
        deadline = time.monotonic() + seconds
        end = select.poll()
        end.register(self._ours, select.POLLIN)
        end.poll(seconds * 1000)
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """End it, unless it is gone."""
        self._popen.kill()

    def close(self) -> None:
        """Give the sentinel back."""
        self._ours.close()
