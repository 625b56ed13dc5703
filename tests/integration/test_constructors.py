"""Leaders that cannot be made: a reason, and nothing left behind, not even a descriptor."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from drp import ExecutionOptions, Leader, WorkerError
from drp.protocol.memory import SharedMemory


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"python": "/nonexistent"}, "python is '/nonexistent', which cannot be run"),
        ({"python": "/nonexistent", "execution": ExecutionOptions(dispatch="async")}, "which cannot be run"),
        ({"devices": "4xcuda"}, "cannot be used"),
        ({"model": "__main__:make", "execution": ExecutionOptions(dispatch="async")}, "made in __main__"),
    ],
)
def test_a_leader_that_cannot_be_made_leaves_nothing(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)  # in a process of xdist it has none
    process = psutil.Process()
    before = process.num_fds(), process.num_threads()
    for _ in range(3):
        with pytest.raises(ValueError, match=words):
            Leader(**{"model": "digits"} | options)
    assert (process.num_fds(), process.num_threads()) == before


@pytest.mark.parametrize("free", [0, 3, 15])
def test_too_few_descriptors_are_a_clear_error(free: int) -> None:
    used = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    limit = next(n for n in range(4096) if n - len([fd for fd in used if fd < n]) == free)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"Too many open files: 16 descriptors are needed; .*ulimit -n"):
            Leader("digits")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_that_cannot_be_started_at_first_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(nbytes: int) -> SharedMemory:
        raise MemoryError(f"no {nbytes} bytes")

    monkeypatch.setattr(SharedMemory, "create", fail)
    with pytest.raises(WorkerError, match=r"^cpu:0: no process can be started: no 16392 bytes$"):
        Leader("digits")
    assert not caplog.records


def test_a_process_whose_memory_nobody_may_open_is_told_so() -> None:
    """As one that began as root and became another user."""
    if os.geteuid():
        pytest.skip("only root may become another user")
    text = """
import os
from drp.protocol.memory import require_openable
require_openable()
os.setresuid(65534, 65534, 65534)
try:
    require_openable()
except PermissionError as error:
    print(error)
"""
    command = [sys.executable, "-c", text]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=Path.cwd()).stdout
    assert out.startswith("this process is not dumpable")
    assert "PR_SET_DUMPABLE" in out


@pytest.mark.parametrize("model", ["package.module:" + "make" * 60, "package.\udcff:make"])
def test_a_model_that_no_message_can_name_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=r"characters; give a name of 200 at most"):
        Leader(model)
