"""Worker processes: `torch.multiprocessing` processes whose start does not affect the parent program."""

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
"""The interpreter's command. The working directory is not on sys.path, where its files could hide standard modules."""


def find_interpreter(python: str | os.PathLike[str] | None = None) -> str:
    """Return the path of the interpreter for the workers; raise ValueError if there is none.

    It is `python` if given, else the executable set by `multiprocessing.set_executable`, else this program if it is an
    interpreter. In a program that embeds Python, it is the interpreter in the environment's folder.
    """
    if python is not None:
        if not os.access(python, os.X_OK) or Path(python).is_dir():
            raise ValueError(f"python is {os.fspath(python)!r}, which cannot be run; give the path of an interpreter")
        return os.fspath(python)
    executable = os.fsdecode(spawn.get_executable() or "")
    if re.fullmatch(r"(python|pypy)[\d.]*[dt]?", Path(executable).name) and os.access(executable, os.X_OK):
        return executable
    version = "{}.{}".format(*sys.version_info)
    for prefix in (sys.prefix, sys.exec_prefix, sys.base_exec_prefix):
        for name in (f"python{version}", "python3", "python"):
            path = Path(prefix, "bin", name)
            if os.access(path, os.X_OK):
                return str(path)
    raise ValueError(
        f"no interpreter for the workers: {executable!r} is not one, and {sys.prefix}/bin has none; give its path as "
        "python="
    )


class Process(SpawnProcess):
    """A process that calls `target(*args)` in a new interpreter `python`.

    It differs from `multiprocessing`'s process where a library must not have side effects on the program: the start
    method stays unset, no resource tracker is started, the main script is not run again, and the process is not listed
    in `active_children`, which the program may join. It can also be started from a daemonic process; the target must
    ensure that the process ends with its parent.
    """

    pid: int | None = None
    """The process's number, once it has started. Other threads may ask for it while the process object is closed."""

    def __init__(self, python: str, name: str, target: Callable[..., object], args: tuple[Any, ...]) -> None:
        super().__init__(name=name, target=target, args=args, daemon=False)
        self.python = python

    def start(self) -> None:
        """Start the process; raise OSError if the machine cannot create one."""
        self._popen = _Popen(self)
        self._sentinel = self._popen.sentinel
        self.pid = self._popen.pid
        del self._target, self._args, self._kwargs  # type: ignore[attr-defined]  # They may keep memory alive.

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickle as the base class: the new process is pinned before it imports torch, which this module imports."""
        return BaseProcess, (), {**self.__dict__, "_start_method": None}


class _Popen(popen_spawn_posix.Popen):
    """The launch of a `Process`. Comments explain where and why it differs from its base class."""

    def __init__(self, process: Process) -> None:
        self._fds: list[int] = []
        self.returncode: int | None = None
        self._launch(process)  # Without flushing the program's streams first, which may block: nothing is forked.

    def _launch(self, process: Process) -> None:
        # spawn.get_preparation_data would fix the start method and run the main script again.
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
            # Pass no resource tracker's descriptor, and use the process's own interpreter, not a global setting.
            command = [process.python, *util._args_from_interpreter_flags(), "-c"]  # type: ignore[attr-defined]  # as spawn does
            command += [BOOT.format(sentinel=sentinel, pipe=pipe), "--multiprocessing-fork"]
            self.pid = util.spawnv_passfds(os.fsencode(process.python), command, [*self._fds, pipe, sentinel])
        except BaseException:
            self.finalizer()
            raise
        finally:
            os.close(pipe)  # Close before writing, so that the write fails if the process has died already.
            os.close(sentinel)
        with suppress(BrokenPipeError), open(ours, "wb", closefd=False) as file:
            file.write(buffer.getbuffer())

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code, None while the process runs; 0 if the program ignores or reaps all its children."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, flag)
            except ChildProcessError:  # The process was reaped elsewhere, so its exit code is unknown.
                self.returncode = 0
            else:
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the process to end, without blocking in waitpid: it may have closed its sentinel and still run."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        wait([self.sentinel], timeout)
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.returncode


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
