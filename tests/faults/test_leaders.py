"""A leader that is killed, starved or denied: nothing of it stays, and what it can say it says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import leftovers, what_stays
from tests.integration.test_lost_workers import python, wait_for_end

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

DEADLINE = 40.0

SCRIPT = """
import os, resource, sys, threading, time
import drp

def send(what):
    print(what, flush=True)

def steps(k, x):
    if k == 3:
        send("sampling")

send("starting")
with drp.Leader("tests.denoisers:make_slow", devices=3) as leader:
    send("idle")
    if STAY:
        time.sleep(60)
    leader.sample(shape=(4,), steps=40, mode="conservative", callback=steps)
    send("closing")
send("closed")
"""


def program(text: str, folder: Path, **more: str) -> subprocess.Popen[str]:
    return python(["-c", textwrap.dedent(text)], folder, **more)


def gone(pids: list[int]) -> bool:
    return wait_for_end(pids, DEADLINE) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
@pytest.mark.parametrize("wait", [0.0, 0.15, 1.0], ids=["spawning", "importing", "loading"])
def test_while_it_starts(tmp_path: Path, wait: float, how: signal.Signals) -> None:
    before = leftovers()
    process = program(SCRIPT.replace("STAY", "False"), tmp_path)
    workers = _workers(process)
    time.sleep(wait)
    workers = _workers(process)
    process.send_signal(how)
    process.communicate(timeout=DEADLINE)
    assert gone(workers)
    assert list(tmp_path.iterdir()) == []
    assert not what_stays(before)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
@pytest.mark.parametrize("state", ["idle", "sampling", "closing"])
@pytest.mark.parametrize("stopped", [False, True], ids=["", "with a stopped worker"])
def test_in_each_state(tmp_path: Path, state: str, how: signal.Signals, stopped: bool) -> None:
    before = leftovers()
    process = program(SCRIPT.replace("STAY", str(state == "idle")), tmp_path)
    assert process.stdout is not None
    workers: list[int] = []
    for line in process.stdout:
        if line.strip() == "idle":
            workers = _workers(process)
        if line.strip() == state:
            break
    if stopped:
        os.kill(workers[0], signal.SIGSTOP)
    process.send_signal(how)
    process.communicate(timeout=DEADLINE)
    assert gone(workers)
    assert list(tmp_path.iterdir()) == []
    assert not what_stays(before)


def _workers(process: subprocess.Popen[str]) -> list[int]:
    deadline = time.monotonic() + DEADLINE
    while len(children := psutil.Process(process.pid).children()) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return [child.pid for child in children]


LIMITED = """
import resource
import drp

with drp.Leader("tests.denoisers:make_free", devices=2) as leader:
    first = leader.sample(shape=(4,), steps=5).samples
    before = resource.getrlimit(LIMIT)
    resource.setrlimit(LIMIT, (SOFT, before[1]))
    try:
        leader.sample(shape=(1024, 1024), steps=5)
    except (MemoryError, OSError) as error:
        print(type(error).__name__, error)
    resource.setrlimit(LIMIT, before)
    assert (leader.sample(shape=(4,), steps=5).samples == first).all()
"""


@pytest.mark.parametrize(
    ("limit", "soft", "words"),
    [
        ("resource.RLIMIT_FSIZE", "100_000", "MemoryError no [0-9]+ bytes of shared memory: .*File too large"),
        ("resource.RLIMIT_NOFILE", "3", "MemoryError no [0-9]+ bytes .*Too many open files.*ulimit -n"),
    ],
)
def test_a_limit_of_the_leaders_ends_the_run_only(tmp_path: Path, limit: str, soft: str, words: str) -> None:
    process = program(LIMITED.replace("LIMIT", limit).replace("SOFT", soft), tmp_path)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert re.search(words, out), out


SHORT = """
import os, resource, signal, time
import drp

def memory():
    return int(open("/proc/self/statm").read().split()[0]) * 4096

with drp.Leader("tests.denoisers:make_slow", devices=2) as leader:
    first = leader.sample(shape=(4,), steps=5).samples
    run = leader.submit(shape=(4,), steps=100)
    before = resource.getrlimit(LIMIT)
    resource.setrlimit(LIMIT, (SOFT, before[1]))
    os.kill(leader.workers[0].pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while leader.workers[0].losses == 0 or leader.workers[0].state == "ready":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1.5)  # until it was to be replaced, at least twice
    print(leader.workers[0].state, leader.workers[0].last_failure)
    resource.setrlimit(LIMIT, before)
    assert run.result(60).incidents
    while leader.workers[0].state != "ready":
        assert time.monotonic() < deadline + 30
        time.sleep(0.01)
    assert (leader.sample(shape=(4,), steps=5).samples == first).all()
"""


@pytest.mark.parametrize(
    ("limit", "soft"),
    [
        ("resource.RLIMIT_FSIZE", "10_000"),
        ("resource.RLIMIT_NOFILE", "8"),
        ("resource.RLIMIT_AS", "memory() - (1 << 20)"),
    ],
)
def test_a_worker_lost_while_its_leader_is_short_of_something_is_replaced_later(
    tmp_path: Path, limit: str, soft: str
) -> None:
    process = program(SHORT.replace("LIMIT", limit).replace("SOFT", soft), tmp_path)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert re.search("^restarting .*no process can be started", out), out


@pytest.mark.parametrize("kind", ["read-only", "full", "missing"])
def test_a_temporary_folder_that_cannot_be_used(tmp_path: Path, kind: str) -> None:
    """The socket needs a folder for a moment, and finds another."""
    folder = tmp_path / kind
    if kind != "missing":
        folder.mkdir()
        options = {"read-only": "ro", "full": "size=4k,nr_inodes=2"}[kind]
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("only root may mount a file system")
        if kind == "full":
            (folder / "a").write_bytes(b"x" * 4096)
    try:
        text = 'import drp\nprint(drp.sample("tests.denoisers:make_free", shape=(4,), steps=3).steps)'
        out, err = program(text, tmp_path, TMPDIR=str(folder)).communicate(timeout=60)
        assert (out, err) == ("3\n", "")
    finally:
        if kind != "missing":
            subprocess.run(["umount", str(folder)], check=True)
