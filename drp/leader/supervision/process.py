"""Process: a worker's process, a `torch.multiprocessing` one that leaves the program it is started from as it was."""

from __future__ import annotations

import io
import math
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import context, popen_spawn_posix, reduction, spawn, util
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.multiprocessing

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess
else:
    SpawnProcess = torch.multiprocessing.get_context("spawn").Process

BOOT = (
    "import os, sys; os.set_inheritable({sentinel}, False); sys.path[:] = filter(None, sys.path); "
    "from multiprocessing.spawn import spawn_main; spawn_main(pipe_handle={pipe})"
)
"""What the interpreter runs. The working directory is not on its path: its files must not hide the standard library."""


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


class Process(SpawnProcess):
    """A process that calls `target(*args)` in a fresh interpreter `python`.

    It is `multiprocessing`'s, with what a library must not do left out: the program's start method stays unset, no
    resource tracker is started, the main script is not run again, and the process is not among the program's
    `active_children`, which are the program's to join. It may be started from a daemonic process too: it is the target
    that sees to it that it ends with its parent.
    """

    def __init__(self, python: str, name: str, target: Callable[..., object], args: tuple[Any, ...]) -> None:
        super().__init__(name=name, target=target, args=args, daemon=False)
        self.python = python

    def start(self) -> None:
        """Start the process; raise OSError if the machine has none to give."""
        self._popen = _Popen(self)
        self._sentinel = self._popen.sentinel
        del self._target, self._args, self._kwargs  # type: ignore[attr-defined]  # which may hold memory

    def __reduce__(self) -> tuple[Any, ...]:
        """Arrive as the plain class: the new process is pinned before it imports torch, which this module does."""
        return BaseProcess, (), {**self.__dict__, "_start_method": None}


class _Popen(popen_spawn_posix.Popen):
    """The launch of a `Process`; comments say where and why it differs from its base class."""

    def __init__(self, process: Process) -> None:
        self._fds: list[int] = []
        self.returncode: int | None = None
        self._launch(process)  # The program's streams are not flushed before, which may block: nothing is forked.

    def _launch(self, process: Process) -> None:
        # spawn.get_preparation_data would fix the start method, and have the main script run.
        path = [os.path.abspath(folder) for folder in sys.path]  # noqa: PTH100  # "" is the working directory
        data = {"name": process.name, "sys_path": path, "sys_argv": getattr(sys, "argv", [""])}
        self.sentinel, sentinel = os.pipe()
        pipe, ours = os.pipe()
        self.finalizer = util.Finalize(self, _close, (self.sentinel, ours))
        try:
            buffer = io.BytesIO()
            context.set_spawning_popen(self)
            try:
                reduction.dump(data, buffer)
                reduction.dump(process, buffer)
            finally:
                context.set_spawning_popen(None)
            # No resource tracker among the descriptors; the interpreter is the process's, the same for all threads.
            command = [process.python, *util._args_from_interpreter_flags(), "-c"]  # type: ignore[attr-defined]  # as spawn does
            command += [BOOT.format(sentinel=sentinel, pipe=pipe), "--multiprocessing-fork"]
            self.pid = util.spawnv_passfds(os.fsencode(process.python), command, [*self._fds, pipe, sentinel])
        except BaseException:
            self.finalizer()
            raise
        finally:
            os.close(pipe)  # before anything is written, so that a process that has died already is seen by that
            os.close(sentinel)
        with suppress(BrokenPipeError), open(ours, "wb", closefd=False) as file:
            file.write(buffer.getbuffer())

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code, None while the process runs; 0 where the program ignores or reaps all its children."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, flag)
            except ChildProcessError:  # Its end has been taken note of, and how it ended is not known any more.
                self.returncode = 0
            else:
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end; never in waitpid: a process that has closed its end of the sentinel may go on running."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        wait([self.sentinel], timeout)
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.returncode


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
