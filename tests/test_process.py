"""Workers' processes: which interpreter they run, and whose signals they heed."""

from __future__ import annotations

import multiprocessing.spawn
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from drp import Leader
from drp.leader.process import Process, find_interpreter
from drp.protocol.memory import SharedMemory


@pytest.fixture
def executable() -> Iterator[None]:
    """Put multiprocessing's interpreter back."""
    before = multiprocessing.spawn.get_executable()
    yield
    multiprocessing.spawn.set_executable(before)


def test_the_programs_own_interpreter_is_the_default() -> None:
    assert find_interpreter() == sys.executable


@pytest.mark.usefixtures("executable")
def test_the_interpreter_of_an_embedding_program_is_found_in_its_environment() -> None:
    for told in ("/usr/bin/env", "/no/such/python3", ""):
        multiprocessing.spawn.set_executable(told)
        found = Path(find_interpreter())
        assert found.parent == Path(sys.prefix, "bin")
        assert found.samefile(sys.executable)


@pytest.mark.usefixtures("executable")
def test_the_interpreter_that_multiprocessing_was_told_is_kept(tmp_path: Path) -> None:
    other = tmp_path / "python3.11"
    other.symlink_to(sys.executable)
    multiprocessing.spawn.set_executable(str(other))
    assert find_interpreter() == str(other)


@pytest.mark.usefixtures("executable")
def test_no_interpreter_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prefix", "exec_prefix", "base_exec_prefix"):
        monkeypatch.setattr(sys, name, str(tmp_path))
    multiprocessing.spawn.set_executable("/usr/bin/env")
    with pytest.raises(ValueError, match=r"no interpreter for the workers: '/usr/bin/env' is none.*python="):
        find_interpreter()
    with pytest.raises(ValueError, match="python is '/no/such/python', which cannot be run"):
        Leader("digits", python="/no/such/python")


def test_an_interpreter_of_another_version_is_a_clear_error() -> None:
    words = SharedMemory.create(4096)
    config = {
        "identity": "worker-0",
        "endpoint": "",
        "leader": words.handle.pid,
        "words": f"/proc/{words.handle.pid}/fd/{words.handle.fd}",
        "beats": 4088,
        "cores": [0],
        "threads": 1,
        "version": [2, 7],
        "main": None,
    }

    process = Process(sys.executable, "drp.workers.entry", config)
    try:
        process.join(30)
        assert process.exitcode == 1
        assert b"is not the Python 2.7 that the leader runs; give its path as python=" in words.read()
    finally:
        process.kill()
        process.close()
        words.close()


def test_a_supervisors_sigterm_is_for_the_leader(tiny: Leader) -> None:
    pids = [worker.pid for worker in tiny.workers if worker.pid is not None]
    before = tiny.sample(labels=[1], steps=6)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    after = tiny.sample(labels=[1], steps=6)
    assert torch.equal(before.samples, after.samples)
    assert [worker.pid for worker in tiny.workers] == pids
