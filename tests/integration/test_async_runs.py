"""Asynchronous dispatch, `ExecutionOptions(dispatch="async")`, on the host: threads for streams, real processes.

These share with a GPU all but the streams themselves: the order of waits and records, and completion records.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import drp
from drp import ExecutionOptions, Leader
from drp.leader.devices import parse_devices
from drp.leader.events import TraceEvent
from drp.leader.job import make_job
from drp.leader.memory.host_stream import CorePlacement
from drp.leader.memory.placement import MemoryPlacement
from drp.leader.request import Request
from drp.leader.runs.run_state import InFlightBatch
from drp.leader.scheduling.policies import LoadAdaptive
from drp.leader.supervision.supervisor import WorkerSlot
from drp.protocol.frames import Frame
from drp.protocol.messages import ModelSpec, ToWorker
from drp.sampling.run import Task
from tests.async_runs import DEADLINE, DEVICE, PLAIN, STEPS, TINY, Misbehaving, Steps, acknowledge, expected
from tests.conftest import dispatching
from tests.waiting import until

pytestmark = pytest.mark.timeout(180)

MODES = ("sequential", "conservative", "aggressive", "window", "rolling", "adaptive")


@pytest.fixture
def two(tiny: Leader, monkeypatch: pytest.MonkeyPatch) -> Iterator[Leader]:
    """Two workers; a draft may take longer than a test."""
    monkeypatch.setattr(tiny.internals._handler, "_draft_timeout", 2 * DEADLINE)
    with dispatching(tiny, "async") as leader:
        yield leader


@pytest.fixture(scope="module")
def batched() -> Iterator[Leader]:
    with Leader(TINY, devices=2, drafts_per_device=3, execution=DEVICE) as leader:
        yield leader


@pytest.fixture(scope="module")
def emulated() -> Iterator[Leader]:
    with Leader(TINY, devices="2xemulated:5ms", execution=DEVICE, draft_timeout=2 * DEADLINE) as leader:
        yield leader


@pytest.mark.parametrize("acknowledges", [False, True], ids=["silent", "acknowledging"])
@pytest.mark.parametrize(("leader", "batch"), [("one", 1), ("batched", 3), ("two", 1)])
def test_bits_callbacks_and_residuals_are_the_references(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, leader: str, batch: int, acknowledges: bool
) -> None:
    mine_leader: Leader = request.getfixturevalue(leader)
    devices = len(mine_leader.workers)
    acknowledge(monkeypatch, mine_leader, acknowledges, size=3)
    for mode in MODES:
        mine, theirs = Steps(), Steps()
        options: dict[str, Any] = {"labels": [1, 2], "steps": 14, "mode": mode, "residuals": True}
        run = mine_leader.sample(**options, callback=mine)
        ref = drp.reference(TINY, **options, callback=theirs, devices=devices, drafts_per_device=batch)
        assert torch.equal(run.samples, ref.samples), mode
        assert (run.rounds, run.evaluations, run.incidents) == (ref.rounds, ref.evaluations, ())
        assert run.drafts == (1 if mode == "sequential" else devices * batch)
        assert (run.residuals, run.cuts) == (ref.residuals, ref.cuts)
        assert [k for k, _ in mine.given] == list(range(1, 15))
        assert mine.equals(theirs), mode
        assert run.device_seconds > 0  # which come with the stamps


def test_times_that_no_record_has_are_made_of_those_that_workers_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, misbehaving: Misbehaving
) -> None:
    """GPUs report the time of an evaluation once it is complete, with a later draft: not that of each."""
    acknowledge(monkeypatch, misbehaving.leader, True, size=1)
    misbehaving.tell("untimed", tmp_path / "unused")
    run = misbehaving.leader.sample(shape=(3,), steps=STEPS, mode="aggressive")
    assert torch.equal(run.samples, expected())
    assert run.device_seconds == pytest.approx(0.25 * run.evaluations)
    assert run.speedup == pytest.approx(0.25 * STEPS / run.seconds)


def test_solvers_with_noise_or_a_memory(two: Leader) -> None:
    for solver, mode in itertools.product(("ddpm", "dpmsolver++", "unipc"), ("conservative", "aggressive")):
        run = two.sample(labels=[4], steps=15, mode=mode, solver=solver)
        ref = drp.reference(TINY, labels=[4], steps=15, mode=mode, solver=solver, devices=2)
        assert torch.equal(run.samples, ref.samples), (solver, mode)


def test_several_runs_and_some_that_are_cancelled(misbehaving: Misbehaving, tmp_path: Path) -> None:
    leader, options = misbehaving.tell("slow", tmp_path), {"shape": (3,), "steps": 12, "mode": "conservative"}
    pending = [leader.submit(**options, seed=seed) for seed in range(6)]  # type: ignore[arg-type]  # types are lost in the dict
    for cancelled in pending[1::2]:
        cancelled.cancel()
    for seed in (0, 2, 4):
        ref = drp.reference(PLAIN, **options, devices=2, seed=seed)  # type: ignore[arg-type]  # likewise
        assert torch.equal(pending[seed].result(DEADLINE).samples, ref.samples)
    until(lambda: all(worker.drafts == 0 for worker in leader.workers))


def test_a_session_waits_on_the_host_beside_runs(one: Leader, two: Leader) -> None:
    pending = two.submit(labels=[1], steps=30)
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    session = two.open_session({"x": x}, {"x": x}, 2, {"labels": torch.tensor([3])})
    for _ in range(5):
        session.arena.drafts[0] = x.reshape(-1)
        rows = session.evaluate([Task(0, 400.0, 0)])
        made = session.arena.predictions[rows[0]].clone()
    session.close()
    assert torch.equal(pending.result(DEADLINE).samples, drp.reference(TINY, labels=[1], steps=30, devices=2).samples)
    session = one.open_session({"x": x}, {"x": x}, 2, {"labels": torch.tensor([3])})
    session.arena.drafts[0] = x.reshape(-1)
    rows = session.evaluate([Task(0, 400.0, 0)])
    assert torch.equal(session.arena.predictions[rows[0]], made)
    session.close()


def test_emulated_devices_take_their_time_and_say_so(emulated: Leader) -> None:
    from drp.trace.summary import summarise

    emulated.timeline = timeline = list[TraceEvent]()
    run = emulated.sample(labels=[2], steps=10, mode="aggressive")
    emulated.timeline = None
    assert torch.equal(run.samples, drp.reference(TINY, labels=[2], steps=10, mode="aggressive", devices=2).samples)
    assert 0.999 * 10 * 0.005 <= run.device_seconds <= 2 * run.seconds
    path = summarise(timeline, emulated.devices).paths[0]
    parts = path.compute + path.transfer + path.leader + path.queue
    assert parts == pytest.approx(path.wall)


def test_a_callback_that_raises_ends_its_run_only(two: Leader) -> None:
    def refuse(k: int, x: torch.Tensor) -> None:
        if k == 5:
            raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        two.sample(labels=[1], steps=12, callback=refuse)
    assert torch.equal(
        two.sample(labels=[1], steps=12).samples, drp.reference(TINY, labels=[1], steps=12, devices=2).samples
    )


def test_what_cannot_be_is_refused(batched: Leader) -> None:
    with pytest.raises(ValueError, match="dispatch is 'gpu'; give 'auto', 'sync' or 'async'"):
        ExecutionOptions(dispatch="gpu")
    with pytest.raises(ValueError, match=r"hedge is 2\.0, but with dispatch=\"async\""):
        Leader(TINY, execution=DEVICE, policy=LoadAdaptive(hedge=2.0))
    with pytest.raises(ValueError, match=r"hedge is 1\.25"):
        Leader(TINY, execution=DEVICE, policy="hedged")
    with pytest.raises(ValueError, match=r"hedge is 1\.25"):
        batched.policy = "rolling-hedged"


# Which worker has which draft, and when.


@pytest.mark.parametrize("acknowledges", [False, True], ids=["silent", "acknowledging"])
def test_messages_run_ahead_of_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, misbehaving: Misbehaving, acknowledges: bool
) -> None:
    """With a round under evaluation workers have the drafts of the next, made of what the first one predicts."""
    job = make_job(Request(shape=(3,), steps=STEPS, drafts=2), ModelSpec(), 2)
    t = [float(t) for t in job.solver.grid.timesteps]
    acknowledge(monkeypatch, misbehaving.leader, acknowledges, size=1)
    leader = misbehaving.tell("gates", tmp_path, closed=[str(t[1]), str(t[2])])
    monkeypatch.setattr(leader.internals.placement, "core_placement", "shared")
    pending = leader.submit(shape=(3,), steps=STEPS, mode="aggressive", drafts=2)
    until(lambda: all(worker.drafts >= 2 for worker in leader.workers))  # 1 and 3, 2 and 4
    for place in (1, 2):
        (tmp_path / f"open {t[place]}").touch()
    assert torch.equal(pending.result(DEADLINE).samples, expected(drafts=2))


def test_only_workers_on_cores_are_silent() -> None:
    cores = parse_devices(2, 1)
    for devices, acknowledges in ((cores, False), ([replace(device, gpu="GPU-0") for device in cores], True)):
        placement = MemoryPlacement(devices, ExecutionOptions(dispatch="async", memory="host"), 1)
        assert placement.workers_acknowledge == acknowledges
        placement.close()


def test_workers_have_the_drafts_of_two_rounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, misbehaving: Misbehaving
) -> None:
    """And no more; once the run is cancelled, none is begun any more."""
    job = make_job(Request(shape=(3,), steps=2 * STEPS, drafts=2), ModelSpec(), 2)
    t = [float(t) for t in job.solver.grid.timesteps]
    leader = misbehaving.tell("gates", tmp_path, closed=[str(t[1]), str(t[2])])
    monkeypatch.setattr(leader.internals.placement, "core_placement", "shared")
    pending = leader.submit(shape=(3,), steps=2 * STEPS, mode="aggressive", drafts=2)
    until(lambda: all((tmp_path / f"at {t[k]}").exists() for k in (1, 2)))
    until(lambda: sum(worker.drafts for worker in leader.workers) == 4)
    pending.cancel()
    until(pending.done)  # Its drafts are cancelled by then.
    for place in (1, 2):
        (tmp_path / f"open {t[place]}").touch()
    carried = leader.internals.runs
    until(lambda: not carried.running and not carried.draining)
    assert {path.name for path in tmp_path.glob("at *")} == {f"at {t[k]}" for k in (0, 1, 2)}
    assert torch.equal(leader.sample(shape=(3,), steps=STEPS, drafts=2).samples, expected(drafts=2))


def test_drafts_of_a_round_do_not_wait_for_one_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, misbehaving: Misbehaving
) -> None:
    """The second of three goes out long after the first was answered, and does not wait for that one's worker."""
    job = make_job(Request(shape=(3,), steps=STEPS, drafts=3), ModelSpec(), 2)
    t = [float(t) for t in job.solver.grid.timesteps]
    leader = misbehaving.tell("gates", tmp_path, closed=[str(t[0]), str(t[4])])
    monkeypatch.setattr(leader.internals.placement, "core_placement", "shared")
    pending = leader.submit(shape=(3,), steps=STEPS, mode="aggressive", drafts=3)
    until(lambda: [worker.drafts for worker in leader.workers] == [3, 1])  # 0, 1 and 3; 2: no room for 4
    (tmp_path / f"open {t[0]}").touch()
    until(lambda: (tmp_path / f"at {t[5]}").exists())
    assert not pending.done()
    (tmp_path / f"open {t[4]}").touch()
    run = pending.result(DEADLINE)
    assert not run.incidents  # and the first was not given up meanwhile
    assert torch.equal(run.samples, expected(drafts=3))


def test_a_round_is_not_divided_where_each_worker_has_one_of_it(two: Leader) -> None:
    """However little room there is: its last draft would come late, and all wait for that."""
    for mode in ("aggressive", "conservative"):
        timeline = list[TraceEvent]()
        two.timeline = timeline
        two.sample(labels=[1], steps=30, mode=mode, drafts=2)
        two.timeline = None
        went = [(mark.kind, mark.step) for mark in timeline if mark.kind in ("sent", "predicted")]
        for steps in (mark.steps for mark in timeline if mark.kind == "scheduled"):
            first = went.index(("sent", steps[0]))
            assert went[first : first + len(steps)] == [("sent", step) for step in steps], mode


def test_drafts_of_a_round_go_to_different_workers_and_the_first_is_first(two: Leader) -> None:
    """Whatever they have of other rounds; so one worker is as good as another only if they are needed."""
    workers: list[int] = []
    for mode, drafts in (("conservative", 2), ("aggressive", 2), ("window", 2), ("sequential", 1)):
        timeline = list[TraceEvent]()
        two.timeline = timeline
        two.sample(labels=[1], steps=30, mode=mode, drafts=drafts)
        two.timeline = None
        sent = iter(mark for mark in timeline if mark.kind == "sent")  # in the order in which rounds are scheduled
        for steps in (mark.steps for mark in timeline if mark.kind == "scheduled"):
            batch = [next(sent) for _ in steps]
            workers = [mark.worker for mark in batch]
            assert [mark.step for mark in batch] == list(steps), mode
            assert len(set(workers)) == len(steps), (mode, steps, workers)
        assert next(sent, None) is None
    assert workers == [0]


def test_workers_are_bound_when_they_are_needed(monkeypatch: pytest.MonkeyPatch, two: Leader) -> None:
    sent = list[tuple[str, int]]()
    post = two.internals.supervisor.enqueue

    def watched(worker_slot: WorkerSlot[InFlightBatch], message: ToWorker) -> None:
        sent.append((type(message).__name__, worker_slot.number))
        post(worker_slot, message)

    monkeypatch.setattr(two.internals.supervisor, "enqueue", watched)
    two.sample(labels=[1] * 5, steps=4, mode="sequential")  # of a size that workers do not remember
    until(lambda: ("Unbind", 0) in sent)
    assert [what for what in sent if what[0] == "Bind"] == [("Bind", 0)]
    assert ("Draft", 1) not in sent


def test_others_are_left_alone_until_the_first_worker_has_its_draft(
    monkeypatch: pytest.MonkeyPatch, two: Leader
) -> None:
    """What they are told disturbs it, and they have time until its evaluation has ended."""
    events = list[object]()
    socket, on_bound = two.internals.pool.local.socket, two.internals.runs.on_bound
    send = socket.send

    def sent(identity: bytes, *messages: Frame) -> None:
        if not any(b"Unbind" in bytes(message) for message in messages):
            events.append(identity)
        send(identity, *messages)

    def bound(worker_slot: WorkerSlot[InFlightBatch], number: int) -> bool:
        events.append("bound")
        return on_bound(worker_slot, number)

    worker = two.internals.supervisor.ready[0].worker
    assert worker is not None
    first = worker.identity
    monkeypatch.setattr(socket, "send", sent)
    monkeypatch.setattr(two.internals.runs, "on_bound", bound)
    for _ in range(3):
        events.clear()
        two.sample(labels=[1], steps=12)
        until(lambda: not two.internals.runs.draining)
        assert events.count("bound") == 1
        assert events[:3] == [first, first, "bound"]


def test_the_leader_does_not_sleep_when_a_round_has_begun_that_it_has_given_nothing_for(
    monkeypatch: pytest.MonkeyPatch, emulated: Leader
) -> None:
    """Not even if it was late: other rounds' drafts would be, too."""
    looks, engine = list[bool](), emulated.internals
    take, refine = engine._receive, engine.runs.refine_all

    def look() -> None:
        looks.append(any(run.round_begun for run in engine.runs.running.values()) and engine._has_work)
        take()

    def dawdle() -> None:
        refine()
        time.sleep(0.006)

    monkeypatch.setattr(engine, "_receive", look)
    monkeypatch.setattr(engine.runs, "refine_all", dawdle)
    emulated.sample(labels=[1], steps=40)
    assert looks
    assert not any(looks)


@pytest.mark.parametrize("name", ["two", "emulated"])
def test_no_record_goes_untold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Else the leader would look by itself, which takes longer here than the test may."""
    leader: Leader = request.getfixturevalue(name)
    options: dict[str, Any] = {"labels": [2], "steps": 40, "drafts": 2}
    several: dict[str, Any] = {"steps": 20, "mode": "conservative", "drafts": 2}
    refs = {mode: drp.reference(TINY, **options, mode=mode).samples for mode in MODES}
    together = [drp.reference(TINY, labels=[label], **several).samples for label in range(4)]
    rooms: tuple[CorePlacement, ...] = ("dedicated", "shared")
    monkeypatch.setattr("drp.leader.memory.host_stream.RECHECK_INTERVAL", 2 * DEADLINE)
    monkeypatch.setattr("drp.leader.supervision.supervisor.HEALTH_CHECK_INTERVAL", 2 * DEADLINE)
    for room in rooms:
        monkeypatch.setattr(leader.internals.placement, "core_placement", room)
        for mode in MODES:
            run = leader.submit(**options, mode=mode).result(DEADLINE)
            assert torch.equal(run.samples, refs[mode]), (room, mode)
        pending = [leader.submit(labels=[label], **several) for label in range(4)]
        for run, ref in zip([each.result(DEADLINE) for each in pending], together, strict=True):
            assert torch.equal(run.samples, ref), room
