"""A worker that is killed or stopped at each state of the protocol: the same bits, or a clear error, in time."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
import torch

import drp
from drp import ExecutionOptions, Leader, WorkerError
from drp.leader.scheduling.policies import LoadAdaptive
from drp.leader.supervision.supervisor import SLOT_RETRY_COST
from tests.conftest import leftovers, what_stays
from tests.faults.injected import WHERE
from tests.waiting import until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

MODEL = "tests.faults.injected:make"
SHAPE = (3, 4)
STEPS = 20
DEADLINE = 60.0
STARTING = ("loading", "sharing")
"""States in which the leader has not promised anything yet: a worker lost there is an error."""
QUIET = ("closing",)
"""States after the last draft: nothing is left to be said about a loss."""


@pytest.fixture(autouse=True)
def _leave_nothing_at_all() -> Iterator[None]:
    before = leftovers()
    yield
    assert not what_stays(before)


@contextmanager
def faulty(
    monkeypatch: pytest.MonkeyPatch, where: str, how: str, who: list[int], **options: object
) -> Iterator[Leader]:
    """Start a leader some of whose workers will meet with a fault."""
    monkeypatch.setenv("DRP_TEST_FAULT", json.dumps({"where": where, "how": how, "who": who}))
    arguments = {"devices": 3, "draft_timeout": 2.0, "start_timeout": 30.0} | options
    with Leader(MODEL, **arguments) as leader:  # type: ignore[arg-type]  # options of a leader
        monkeypatch.delenv("DRP_TEST_FAULT")
        yield leader


def expected(mode: str, seed: int = 0, drafts: int = 3) -> torch.Tensor:
    return drp.reference(MODEL, shape=SHAPE, steps=STEPS, mode=mode, drafts=drafts, seed=seed).samples


@pytest.fixture(autouse=True)
def _reference_is_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference makes the denoiser in this process, which has no worker's command line."""
    monkeypatch.setattr("sys.argv", ["tests", json.dumps({"identity": "worker-999-0"})])


def sample(leader: Leader, mode: str, seed: int = 0) -> drp.Result:
    pending = leader.submit(shape=SHAPE, steps=STEPS, mode=mode, drafts=3, seed=seed)
    return pending.result(DEADLINE)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("where", [where for where in WHERE if where not in STARTING])
def test_one_worker(monkeypatch: pytest.MonkeyPatch, where: str, how: str) -> None:
    mode = ["aggressive", "conservative", "adaptive", "rolling"][WHERE.index(where) % 4]
    with faulty(monkeypatch, where, how, [1]) as leader:
        for seed in range(2):  # the loss, and what is after it
            result = sample(leader, mode, seed)
            assert torch.equal(result.samples, expected(mode, seed)), f"run {seed} has other bits"
        if where not in QUIET:
            until(lambda: leader.workers[1].losses == 1)  # One that stopped with nothing to do is noticed a bit later.
            assert re.search(r"SIGKILL|draft_timeout|no heartbeat", leader.workers[1].last_failure)
            until(lambda: [worker.state for worker in leader.workers] == ["ready"] * 3)
        assert torch.equal(sample(leader, mode, 5).samples, expected(mode, 5))


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("where", [where for where in WHERE if where not in (*STARTING, *QUIET)])
def test_one_worker_of_those_that_answer_ahead(monkeypatch: pytest.MonkeyPatch, where: str, how: str) -> None:
    mode = ["aggressive", "conservative", "adaptive", "rolling"][WHERE.index(where) % 4]
    with faulty(monkeypatch, where, how, [1], execution=ExecutionOptions(dispatch="async")) as leader:
        for seed in range(2):
            result = sample(leader, mode, seed)
            assert torch.equal(result.samples, expected(mode, seed)), f"run {seed} has other bits"
        until(lambda: leader.workers[1].losses == 1)
        until(lambda: [worker.state for worker in leader.workers] == ["ready"] * 3)
        assert torch.equal(sample(leader, mode, 5).samples, expected(mode, 5))


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "SIGSEGV", "exit"])
@pytest.mark.parametrize("where", STARTING)
def test_at_the_start_it_is_an_error(monkeypatch: pytest.MonkeyPatch, where: str, how: str) -> None:
    words = {"SIGSTOP": r"start_timeout", "exit": "exit code 9"}.get(how, f"was killed by {how}")
    with (
        pytest.raises(WorkerError, match=rf"worker 1 \(.*{words}"),
        faulty(monkeypatch, where, how, [1], start_timeout=12.0),
    ):
        raise AssertionError("it started")


@pytest.mark.parametrize("how", ["SIGSEGV", "exit"])
def test_a_crash_says_its_last_words(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    with faulty(monkeypatch, "during", how, [0]) as leader:
        result = sample(leader, "aggressive")
        assert torch.equal(result.samples, expected("aggressive"))
        assert re.search("injected.py.* in predict" if how == "SIGSEGV" else "exit code 9", "\n".join(result.incidents))


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("who", [[0, 2], [0, 1, 2]], ids=["two", "all"])
@pytest.mark.parametrize("where", ["during", "after"])
def test_several_at_once(monkeypatch: pytest.MonkeyPatch, where: str, how: str, who: list[int]) -> None:
    with faulty(monkeypatch, where, how, who) as leader:
        result = sample(leader, "aggressive")
        assert torch.equal(result.samples, expected("aggressive"))
        losses = [each for each in result.incidents if each.startswith("worker ")]  # others say how far a run went back
        assert len(losses) == len(who)


def test_several_runs_lose_a_worker_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty(monkeypatch, "during", "SIGKILL", [0]) as leader:
        pending = [leader.submit(shape=SHAPE, steps=STEPS, mode="conservative", drafts=3, seed=s) for s in range(4)]
        for seed, run in enumerate(pending):
            assert torch.equal(run.result(DEADLINE).samples, expected("conservative", seed))


def test_one_that_replaces_another_is_killed_as_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty(monkeypatch, "during", "SIGKILL", [1]) as leader:
        sample(leader, "aggressive")
        for turn in range(2, 4):
            until(lambda: leader.workers[1].state == "starting")
            os.kill(leader.workers[1].pid or 0, signal.SIGKILL)
            until(functools.partial(_has_lost, leader, turn))
        until(lambda: leader.workers[1].state == "ready")
        assert torch.equal(sample(leader, "aggressive").samples, expected("aggressive"))


def test_kills_of_starting_workers_do_not_give_up_a_slot_while_another_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drp.leader.supervision.supervisor.BACKOFF", 0.01)
    monkeypatch.setattr("drp.leader.supervision.supervisor.MAX_BACKOFF", {"serving": 0.01, "down": 0.01})
    with faulty(monkeypatch, "never", "", [], devices=2) as leader:
        for turn in range(1, 26):
            _kill_starting(leader, 1, turn)
        until(lambda: leader.workers[1].state == "ready")
        assert torch.equal(sample(leader, "aggressive").samples, expected("aggressive"))


def test_kills_of_starting_workers_end_the_leader_at_a_deadline_if_none_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("drp.leader.supervision.supervisor.BACKOFF", 0.01)
    with faulty(monkeypatch, "never", "", [], devices=1, start_timeout=20.0) as leader:
        for turn in range(1, 12):
            _kill_starting(leader, 0, turn)
        leader.internals.supervisor._start_timeout = 0.1
        pending = leader.submit(shape=SHAPE, steps=STEPS, drafts=3)
        _kill_starting(leader, 0, 12)
        with pytest.raises(WorkerError, match=r"no worker is left: worker 0 .* was killed by SIGKILL"):
            pending.result(DEADLINE)
        assert leader.closed


def test_before_its_first_word(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[BaseException] = []

    def start() -> None:
        try:
            Leader(MODEL, devices=2).close()
        except WorkerError as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    known = {child.pid for child in psutil.Process().children()}
    thread.start()
    until(lambda: len({child.pid for child in psutil.Process().children()} - known) == 2)
    for child in psutil.Process().children():
        if child.pid not in known:
            child.kill()
    thread.join(DEADLINE)
    assert not thread.is_alive()
    assert len(errors) == 1
    assert re.search(r"worker \d .* was killed by SIGKILL", str(errors[0]))


def test_one_that_is_late_is_overtaken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With hedging a stopped worker's draft goes to an idle one long before its deadline."""
    with faulty(monkeypatch, "during", "SIGSTOP", [1], policy=LoadAdaptive(hedge=3.0), draft_timeout=30.0) as leader:
        leader.timeline = []
        pending = leader.submit(shape=SHAPE, steps=STEPS, mode="conservative", drafts=2)
        assert torch.equal(pending.result(20.0).samples, expected("conservative", drafts=2))
        assert next(mark.worker for mark in leader.timeline if mark.kind == "hedged") == 1
        assert leader.workers[1].losses == 0
        os.kill(leader.workers[1].pid or 0, signal.SIGCONT)  # Its late answer is nobody's.
        until(lambda: leader.workers[1].drafts == 0)
        assert torch.equal(sample(leader, "aggressive").samples, expected("aggressive"))


def test_none_left_names_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no worker can be started any more, the end comes with every worker's own."""
    with faulty(monkeypatch, "during", "SIGKILL", [0, 1, 2]) as leader:
        monkeypatch.setitem(SLOT_RETRY_COST, "own", 1)
        leader.internals.supervisor._start_timeout = 0.1  # Nothing that replaces them is up so soon.
        with pytest.raises(WorkerError, match=r"no worker is left: worker 0 (.|\n)*; worker 1 (.|\n)*; worker 2 "):
            sample(leader, "aggressive")
        with pytest.raises(WorkerError, match="closed; make a new one: no worker is left"):
            sample(leader, "aggressive")


def test_memory_that_a_worker_does_not_get(monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty(monkeypatch, "never", "", []) as leader:
        victim = psutil.Process(leader.workers[0].pid)
        victim.rlimit(psutil.RLIMIT_AS, (victim.memory_info().vms, -1))  # no more than it has
        pending = leader.submit(shape=(4, 1024, 1024), steps=4, drafts=2)
        assert pending.result(DEADLINE).incidents[0].startswith("worker 0 ")
        assert torch.equal(sample(leader, "aggressive").samples, expected("aggressive"))


def _kill_starting(leader: Leader, number: int, turn: int) -> None:
    """Kill a worker, which is the `turn`th that its slot loses."""
    until(lambda: leader.workers[number].pid is not None and leader.workers[number].losses == turn - 1)
    os.kill(leader.workers[number].pid or 0, signal.SIGKILL)
    until(lambda: leader.workers[number].losses == turn)


def _has_lost(leader: Leader, count: int) -> bool:
    return leader.workers[1].losses == count
