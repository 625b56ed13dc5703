"""Workers that cannot start or die idle, and leaders that are killed: a clear error in time, nothing left."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

import drp
from drp import Leader, WorkerError, models
from drp.leader.supervision.process import Process
from tests.conftest import leftovers, what_stays

SHAPE = (1, 4, 4)
DEADLINE = 60.0


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("tests.denoisers:fail_to_load", "FileNotFoundError: weights of the test are not there(.|\n)*Traceback"),
        ("tests.denoisers:die_while_loading", "ended with exit code 7"),
        ("tests.denoisers:make_other_shapes", "made other weights .* its factory must not vary"),
    ],
)
def test_a_worker_that_cannot_start_is_a_clear_error(model: str, words: str) -> None:
    before = leftovers()
    with pytest.raises(WorkerError) as error:
        Leader(model, devices=2 if model.endswith("make_other_shapes") else 1)
    assert re.search(words, str(error.value)), str(error.value)
    del error
    assert not what_stays(before)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("tests.denoisers:exhaust_memory", RuntimeError, "alloc"),
        ("tests.denoisers:not_there", AttributeError, "not_there"),
        ("tests.denoisers:not_callable", TypeError, "not callable"),
        (
            "tests.denoisers:return_nothing",
            TypeError,
            "return_nothing returned NoneType; a factory returns a module or a callable",
        ),
        ("no_such_package:make", ModuleNotFoundError, "No module named 'no_such_package'"),
    ],
)
def test_a_model_that_cannot_be_loaded_says_why(model: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):  # in a worker it is told like the one above
        models.load(model)


def test_a_worker_that_does_not_start_in_time_is_a_clear_error() -> None:
    """It has got to loading by then, unless the machine is busy."""
    before = leftovers()
    with pytest.raises(WorkerError, match=r"worker 0 .* did not (load .*)?start within 3 s \(start_timeout\)"):
        Leader("tests.denoisers:hang_while_loading", start_timeout=3)
    assert not what_stays(before)


def test_a_worker_that_says_what_it_does_not_owe_is_lost_and_given_back_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its loss costs no more than the worker; here its process takes its time to end, too."""
    before, kill = leftovers(), Process.kill
    late: list[threading.Timer] = []

    def kill_late(process: Process) -> None:
        def kill_now() -> None:
            with contextlib.suppress(ValueError):  # It has ended, and was closed.
                kill(process)

        late.append(threading.Timer(3.0, kill_now))
        late[-1].start()

    with Leader("tests.denoisers:make_chatty", devices=2) as leader, monkeypatch.context() as patch:
        patch.setattr(Process, "kill", kill_late)
        run = leader.sample(shape=SHAPE, steps=20)
        assert leader.internals.pool.local.dying
    assert re.search(r"worker 0 .* sent an unexpected Hello", run.incidents[0])
    ref = drp.reference("tests.denoisers:make_free", devices=2, shape=SHAPE, steps=20)
    assert torch.equal(run.samples, ref.samples)
    for timer in late:
        timer.join(DEADLINE)
    assert not what_stays(before)


def program(text: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text))
    return python([str(path), *options], folder, PYTHONUNBUFFERED="1")


def python(arguments: list[str], folder: Path, **more: str) -> subprocess.Popen[str]:
    """Start an interpreter in a folder, which is also where its temporary files go."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(folder)} | more
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=env,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and so do their children: tests may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_end(pids: list[int], seconds: float = 10.0) -> list[int]:
    """Return which of the processes are still there at the deadline."""
    deadline = time.monotonic() + seconds
    while (left := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


ENDLESS = """
    import os, threading
    import drp

    def main():
        leader = drp.Leader("tests.denoisers:make_slow", devices=1)
        def tell(k, x):
            if k == 3:
                print(*[worker.pid for worker in leader.workers], flush=True)
        leader.sample(shape=(4,), steps=900, callback=tell)

    if __name__ == "__main__":
        START
"""


def test_no_orphans_when_the_leader_is_killed(tmp_path: Path) -> None:
    """Not even a stopped worker of a leader that was started by another thread than the main one."""
    in_thread = "t = threading.Thread(target=main); t.start(); t.join()"
    process = program(ENDLESS.replace("START", in_thread), tmp_path)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 1
    os.kill(pids[0], signal.SIGSTOP)
    process.kill()
    process.communicate(timeout=10)
    assert wait_for_end(pids) == []
    deadline = time.monotonic() + 5
    while list(tmp_path.glob("drp-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.glob("drp-*")) == []


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    process = program(ENDLESS.replace("START", "main()"), tmp_path)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    for pid in (process.pid, *pids):  # as a terminal does: to the whole group
        os.kill(pid, signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert wait_for_end(pids) == []
    assert list(tmp_path.glob("drp-*")) == []


def test_a_script_needs_no_main_guard_finds_its_process_as_it_was_and_may_fork(tmp_path: Path) -> None:
    """The forked child does not end its parent's workers."""
    text = """
        import multiprocessing, os, psutil, torch, warnings
        import drp
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)  # since Python 3.12
        torch.manual_seed(3)
        before = torch.get_rng_state()
        with drp.Leader("tests.denoisers:make_free", devices=1) as leader:
            first = leader.sample(shape=(4,), steps=3)
            slot = {"x": torch.zeros(1)}
            session = leader.open_session(slot, slot, 1, {})
            assert multiprocessing.get_start_method(allow_none=True) is None
            running = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
            assert len(running) == 1 and "spawn_main" in running[0], running
            child = os.fork()
            if child == 0:
                try:
                    leader.sample(shape=(4,), steps=3)
                except RuntimeError as error:
                    assert "forked from" in str(error)
                session.arena.memory.record_event = None  # On a GPU, this fails in a forked child.
                try:
                    session.evaluate([drp.sampling.run.Task(0, 0.0, 0)])
                except RuntimeError as error:
                    assert "forked from" in str(error)
                    session.close()
                    raise SystemExit(0)  # with finalizers, as any child might
            assert os.waitpid(child, 0)[1] == 0
            session.close()
            assert (leader.sample(shape=(4,), steps=3).samples == first.samples).all()
        assert not psutil.Process().children()
        assert torch.equal(torch.get_rng_state(), before)
        print(first.steps)
    """
    process = program(text, tmp_path)
    assert (*process.communicate(timeout=60), process.returncode) == ("3\n", "", 0)
    assert list(tmp_path.glob("drp-*")) == []


def test_a_model_made_in_a_script_and_a_leader_that_is_never_closed(tmp_path: Path) -> None:
    """Workers run the script with its options; they end with its interpreter."""
    text = """
        import argparse
        import drp
        parser = argparse.ArgumentParser()
        parser.add_argument("--scale", type=float, required=True)
        scale = parser.parse_args().scale
        def make():
            return lambda x, t, cond: x * scale
        if __name__ == "__main__":
            leader, options = drp.Leader(make, devices=1), dict(shape=(4,), steps=3)
            assert (leader.sample(**options).samples == drp.reference(make, **options).samples).all()
            print(*[worker.pid for worker in leader.workers])
    """
    process = program(text, tmp_path, "--scale", "0.1")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert wait_for_end([int(word) for word in out.split()]) == []
    assert list(tmp_path.glob("drp-*")) == []


def test_a_model_made_in_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    text = """
        import drp
        def make():
            return lambda x, t, cond: x / 2
        drp.sample(make, devices=1, shape=(4,), steps=3)
    """
    process = program(text, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "if __name__ == '__main__':" in err
    assert "WorkerError: worker 0" in err
    assert list(tmp_path.glob("drp-*")) == []
