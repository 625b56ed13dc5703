"""Workers' processes: which interpreter they run, and whose signals they heed."""

from __future__ import annotations

import multiprocessing.spawn
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

import psutil
import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from drp import Leader
from drp.leader.supervision.process import Process, find_interpreter
from drp.protocol.memory import SharedMemory
from drp.workers import entry
from drp.workers.config import WorkerConfig
from tests.closing import close_all


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
    with pytest.raises(ValueError, match=r"no interpreter for the workers: '/usr/bin/env' is not one.*python="):
        find_interpreter()
    with pytest.raises(ValueError, match="python is '/no/such/python', which cannot be run"):
        Leader("digits", python="/no/such/python")


def test_an_interpreter_of_another_version_is_a_clear_error() -> None:
    words, listener = SharedMemory.create(4096), socket.socket(socket.AF_UNIX)
    config = WorkerConfig(
        identity="worker-0",
        listener=listener,
        leader=words.handle.pid,
        crash_log=f"/proc/{words.handle.pid}/fd/{words.handle.fd}",
        heartbeat_offset=4088,
        cores=(0,),
        threads=1,
        version=(2, 7),
        main=None,
    )
    process = Process(sys.executable, "worker-0", entry.main, (config,))
    process.start()
    try:
        process.join(30)
        assert process.exitcode == 1
        assert b"is not the Python 2.7 that the leader runs; give its path as python=" in words.read()
    finally:
        end(process)
        words.close()
        listener.close()


def end(process: Process) -> None:
    process.kill()
    process.join(30)
    process.close()


def work(results: Connection, tensor: Tensor, wait: bool) -> None:
    """What a process is asked to do: say how it finds itself, write to a tensor, and wait for its end."""
    results.send((sys.argv, sys.path, multiprocessing.get_start_method(allow_none=True), str(Path.cwd())))
    tensor.fill_(3)
    results.send("written")
    time.sleep(60 if wait else 0)


def test_a_process_is_torchs_and_changes_nothing_of_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--scale", "0.1"])
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    before = multiprocessing.get_start_method(allow_none=True), multiprocessing.active_children()
    descriptors = psutil.Process().num_fds()
    tensor = torch.zeros(5)
    results, theirs = Pipe(duplex=False)
    process = Process(find_interpreter(), "some-name", work, (theirs, tensor, True))
    assert isinstance(process, torch.multiprocessing.get_context("spawn").Process)
    process.start()
    theirs.close()
    try:
        assert results.poll(60)
        path = [str(Path(folder).absolute()) for folder in sys.path]
        assert results.recv() == (sys.argv, path, None, str(Path.cwd()))
        assert results.poll(60)
        assert results.recv() == "written"
        assert tensor.tolist() == [3.0] * 5
        assert process.is_alive()
        assert process.exitcode is None
        assert (multiprocessing.get_start_method(allow_none=True), multiprocessing.active_children()) == before
        started = [child.cmdline() for child in psutil.Process().children(recursive=True)]
        assert not any("resource_tracker" in part for command in started for part in command)
    finally:
        end(process)
        results.close()
    del tensor
    assert psutil.Process().num_fds() == descriptors


def test_a_process_that_cannot_run_ends_and_is_noticed() -> None:
    process = Process("/bin/false", "some-name", work, ())
    process.start()
    assert wait([process.sentinel], 30)
    process.join(30)
    assert process.exitcode == 1
    process.close()


def test_the_end_of_a_process_that_the_program_itself_reaped_is_noticed() -> None:
    process = Process("/bin/true", "some-name", work, ())
    process.start()
    assert process.pid is not None
    os.waitpid(process.pid, 0)
    process.join(30)
    assert (process.is_alive(), process.exitcode) == (False, 0)
    process.close()


def test_a_process_that_closes_the_sentinel_is_not_waited_for_without_end() -> None:
    process = Process(find_interpreter(), "some-name", close_all, ())
    process.start()
    try:
        assert wait([process.sentinel], 60)
        process.join(0.1)
        assert process.is_alive()
    finally:
        end(process)


def test_a_supervisors_sigterm_is_for_the_leader(tiny: Leader) -> None:
    pids = [worker.pid for worker in tiny.workers if worker.pid is not None]
    before = tiny.sample(labels=[1], steps=6)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    after = tiny.sample(labels=[1], steps=6)
    assert torch.equal(before.samples, after.samples)
    assert [worker.pid for worker in tiny.workers] == pids


def test_the_number_of_a_closed_process_is_known() -> None:
    process = Process(sys.executable, "worker", time.sleep, (0,))
    process.start()
    pid = process.pid
    assert pid is not None
    process.join(60)
    process.close()
    assert process.pid == pid
