"""Policies: the same bits as the reference, in the engine; one of one's own, in the engine and the simulator."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import drp
from drp import ExecutionOptions, Leader
from drp.leader.events import Timeline
from drp.leader.scheduling.policies import POLICIES, Barrier, Policy, find_policy
from drp.sampling.drafts import DAMPED
from drp.sampling.mode_selection import make_mode
from drp.sampling.mode_wrappers import PicardSweeps
from drp.sampling.modes import Aggressive
from drp.simulate import Workload, make_devices, simulate
from drp.trace import record, summarise
from examples import own_policy
from examples.own_policy import ReservedDevice
from tests.integration.test_trace import check_format, names

LATE = "emulated:1ms:jitter=50%:straggler=8x@20%:link=100us@1GB/s"
TINY = "tests.denoisers:Tiny"
SYNC = ExecutionOptions(dispatch="sync")


@pytest.fixture(scope="module")
def late() -> Iterator[Leader]:
    """Three workers that are often late."""
    with Leader(TINY, devices=[LATE] * 3, policy="barrier") as leader:
        yield leader


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("mode", "drafts"), [("aggressive", 3), ("conservative", 2), ("aggressive", 7)])
def test_bits_are_those_of_the_mode_that_a_policy_schedules(late: Leader, name: str, mode: str, drafts: int) -> None:
    late.policy = name
    made = POLICIES[name].schedule(make_mode(mode, drafts, 0.0, DAMPED))
    reference = drp.reference(TINY, labels=[1, 2], steps=17, mode=made)
    for _ in range(2):
        result = late.sample(labels=[1, 2], steps=17, mode=mode, drafts=drafts)
        assert torch.equal(result.samples, reference.samples)
        assert (result.rounds, result.evaluations) == (reference.rounds, reference.evaluations)
        assert result.devices == (LATE,) * 3
        assert result.dispatch == ("sync" if POLICIES[name].hedge else "async")


def test_eager_sweeps_have_the_bits_of_sweeps(late: Leader) -> None:
    expected = drp.reference(TINY, labels=[1], steps=17, mode=PicardSweeps(Aggressive(4), 2))
    late.policy = "eager"
    result = late.sample(labels=[1], steps=17, mode="aggressive", drafts=4, sweeps=2)
    assert torch.equal(result.samples, expected.samples)
    assert result.evaluations == expected.evaluations


def test_a_policy_of_ones_own_runs_in_both(late: Leader) -> None:
    late.policy = ReservedDevice()
    late.timeline = marks = Timeline()
    result = late.sample(labels=[1], steps=30, drafts=2)
    late.timeline = None
    assert torch.equal(result.samples, drp.reference(TINY, labels=[1], steps=30, drafts=2).samples)
    hedged = {mark.step for mark in marks if mark.kind == "hedged"}
    assert {mark.step for mark in marks if mark.kind == "sent" and mark.worker == 2} <= hedged
    outcome = simulate(make_devices([LATE] * 3), ReservedDevice(), Workload(Aggressive(2), 30, 50))
    assert outcome.hedged
    assert len(Path(own_policy.__file__).read_text().splitlines()) <= 40


def test_a_window_outlives_a_worker_and_its_trace_shows_it(tmp_path: Path) -> None:
    with Leader(TINY, devices=["emulated:20ms"] * 2, policy="rolling", execution=SYNC) as leader:
        pid = next(worker.pid for worker in leader.workers if worker.number == 1)

        def kill(k: int, x: torch.Tensor) -> None:
            if k == 6:
                assert pid is not None
                os.kill(pid, signal.SIGKILL)

        with record(leader, tmp_path / "run.json"):
            result = leader.sample(labels=[1], steps=20, drafts=4, callback=kill)
    assert torch.equal(result.samples, drp.reference(TINY, labels=[1], steps=20, mode="rolling", drafts=4).samples)
    assert result.incidents
    events = check_format(tmp_path / "run.json")
    assert "lost" in names(events, "i")
    assert "lost" in names(events, "X")
    assert sum(event["ph"] == "f" for event in events) == 20


def test_the_draft_after_next_may_be_out_before_the_next_is_back(late: Leader) -> None:
    late.policy = "rolling-hedged"
    late.timeline = marks = Timeline()
    result = late.sample(labels=[1], steps=40, drafts=3)
    late.timeline = None
    assert result.dispatch == "sync"
    formed = [mark.steps for mark in marks if mark.kind == "scheduled"]
    assert formed[0] == (0,)
    assert formed[1] == (1, 2, 3)
    assert any(len(steps) == 1 for steps in formed[2:])
    assert sorted(step for steps in formed for step in steps) == list(range(40))


def test_names(late: Leader) -> None:
    assert isinstance(find_policy("rolling"), Policy)
    with pytest.raises(ValueError, match="unknown policy 'fast'; choose one of barrier, eager"):
        find_policy("fast")
    with pytest.raises(ValueError, match=r"hedge is 1\.0; give a factor above 1"):
        Barrier(hedge=1.0)
    with pytest.raises(ValueError, match="depth is 0; give a whole number of at least 1"):
        ReservedDevice(depth=0)
    with pytest.raises(ValueError, match="unknown policy"):
        late.policy = "fast"


def test_what_one_path_waits_for_adds_up_for_every_policy(late: Leader) -> None:
    for name in POLICIES:
        late.policy = name
        late.timeline = marks = Timeline()
        late.sample(labels=[1], steps=20, drafts=5)
        late.timeline = None
        (path,) = summarise(marks, late.devices).paths
        parts = path.compute + path.transfer + path.arithmetic + path.sending + path.queue + path.end
        assert parts == pytest.approx(path.wall), name
