"""A leader that does not run for a while: workers that answered meanwhile, or were stopped with it, are not late."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drp import ExecutionOptions, Leader

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]


@pytest.mark.parametrize("dispatch", ["sync", "async"])
def test_a_callback_may_take_longer_than_a_draft(dispatch: str) -> None:
    gpu = ExecutionOptions(dispatch=dispatch)
    with Leader("tests.denoisers:make_slow_sine", devices=2, draft_timeout=2.0, execution=gpu) as leader:
        expected = leader.sample(shape=(3, 4), steps=30, seed=1).samples

        def callback(k: int, state: Tensor) -> None:
            if k == 10:
                time.sleep(3.0)

        runs = [leader.submit(shape=(3, 4), steps=30, seed=1, callback=each) for each in (callback, None)]
        for run in runs:
            result = run.result(60.0)
            assert torch.equal(result.samples, expected)
            assert result.incidents == ()
        assert [worker.losses for worker in leader.workers] == [0, 0]


def test_a_thread_that_holds_the_interpreters_lock_is_not_the_workers_delay() -> None:
    with Leader("tests.denoisers:make_slow_sine", devices=2, draft_timeout=2.0) as leader:
        run = leader.submit(shape=(3, 4), steps=60, seed=1)
        while run.rounds < 2:
            time.sleep(0.005)
        interval = sys.getswitchinterval()
        sys.setswitchinterval(10.0)
        try:
            deadline = time.monotonic() + 4.0
            while time.monotonic() < deadline:  # never gives the lock up
                pass
        finally:
            sys.setswitchinterval(interval)
        assert run.result(60.0).incidents == ()
        assert [worker.losses for worker in leader.workers] == [0, 0]


STOPPED = """
import drp
gpu = drp.ExecutionOptions(dispatch=ORDERING)
with drp.Leader("tests.denoisers:make_slow", devices=2, draft_timeout=2.0, execution=gpu) as leader:
    for _ in range(2):
        result = leader.sample(shape=(4,), steps=30, callback=lambda k, x: print("step", k, flush=True))
        print("incidents", result.incidents, [worker.losses for worker in leader.workers], flush=True)
"""


@pytest.mark.parametrize("dispatch", ["sync", "async"])
def test_a_group_that_is_stopped_and_continued_goes_on(tmp_path: Path, dispatch: str) -> None:
    """As by Ctrl-Z and fg, or a container that is frozen for a while."""
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED.replace("ORDERING", repr(dispatch))],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path)},
    )
    told = []
    with process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line == "step 9\n":
                    os.killpg(process.pid, signal.SIGSTOP)
                    time.sleep(6.0)
                    os.killpg(process.pid, signal.SIGCONT)
                elif line.startswith("incidents"):
                    told.append(line)
            assert process.wait(30) == 0
        finally:
            process.kill()
    assert told == ["incidents () [0, 0]\n"] * 2
