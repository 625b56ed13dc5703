"""Answers ahead of the device, `ExecutionOptions(dispatch="async")`, on the host: threads for streams, real processes.

What these share with a GPU is all but the streams themselves: the order of waits and records, stamps and what is proven
by them, what happens when they are not what they should be.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import drp
from drp import ExecutionOptions, Leader, WorkerError
from drp.leader.devices import parse_devices
from drp.leader.events import TraceEvent
from drp.leader.job import make_job
from drp.leader.memory.host_stream import CorePlacement
from drp.leader.memory.placement import MemoryPlacement
from drp.leader.request import Request
from drp.leader.runs.run_state import DraftSlot, PendingCompletion
from drp.leader.scheduling.policies import LoadAdaptive
from drp.protocol.frames import Frame
from drp.protocol.messages import ModelSpec, ToWorker
from drp.protocol.timeline import (
    PENDING,
)
from drp.sampling.run import Task
from drp.workers.cuda_errors import UNRECOVERABLE_ERRORS, is_unrecoverable
from tests.conftest import dispatching, leftovers, until, what_stays

pytestmark = pytest.mark.timeout(180)

DEVICE = ExecutionOptions(dispatch="async")
TINY = "tests.denoisers:Tiny"
MODEL = "tests.misbehaving:make"
PLAIN = "tests.misbehaving:make_plain"
MODES = ("sequential", "conservative", "aggressive", "window", "rolling", "adaptive")
STEPS = 20
DEADLINE = 60.0


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


class Misbehaving:
    """A leader whose workers do what a test tells them."""

    def __init__(self, leader: Leader, orders: Path) -> None:
        self.leader, self._orders = leader, orders

    def tell(self, what: str, path: Path, **more: object) -> Leader:
        """Have a run misbehave; return the leader."""
        written = self._orders.with_suffix(".new")
        written.write_text(json.dumps({"what": what, "path": str(path), **more}))
        written.replace(self._orders)
        return self.leader

    def behave(self) -> None:
        """Take the orders back, and wait until all workers are ready again and no run is left."""
        self._orders.unlink(missing_ok=True)
        until(lambda: [worker.state for worker in self.leader.workers] == ["ready"] * 2)
        until(lambda: not self.leader.internals.runs.running and not self.leader.internals.runs.draining)


@contextmanager
def misbehaving_workers(folder: Path, devices: int = 2) -> Iterator[Misbehaving]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRP_TEST_ORDERS", str(folder / "orders"))  # also in the environment of workers that are replaced
        with Leader(MODEL, devices=devices, draft_timeout=3.0, execution=DEVICE) as leader:
            yield Misbehaving(leader, folder / "orders")


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Misbehaving]:
    with misbehaving_workers(tmp_path_factory.mktemp("orders")) as started:
        yield started


@pytest.fixture
def misbehaving(started: Misbehaving) -> Iterator[Misbehaving]:
    yield started
    started.behave()


def acknowledge(monkeypatch: pytest.MonkeyPatch, leader: Leader, hears: bool, size: int) -> None:
    """Let workers say that a draft is queued, as those have to whose records have no numbers, or let them not.

    A run of another size follows: what workers keep of the run before is of the old kind.
    """
    monkeypatch.setattr(MemoryPlacement, "workers_acknowledge", hears)
    options: dict[str, Any] = {"labels": [0] * size} if leader.spec.classes else {"shape": (3 + size,)}
    leader.sample(steps=2, **options)
    until(lambda: not leader.internals.runs.draining)


class Steps:
    """A callback that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[int, torch.Tensor]] = []

    def __call__(self, k: int, x: torch.Tensor) -> None:
        self.given.append((k, x.clone()))

    def equals(self, other: Steps) -> bool:
        same = [k == j and torch.equal(x, y) for (k, x), (j, y) in zip(self.given, other.given, strict=False)]
        return len(self.given) == len(other.given) and all(same)


# What it is to give.


@pytest.mark.parametrize("hears", [False, True], ids=["silent", "heard"])
@pytest.mark.parametrize(("leader", "batch"), [("one", 1), ("batched", 3), ("two", 1)])
def test_bits_callbacks_and_residuals_are_the_references(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, leader: str, batch: int, hears: bool
) -> None:
    mine_leader: Leader = request.getfixturevalue(leader)
    devices = len(mine_leader.workers)
    acknowledge(monkeypatch, mine_leader, hears, size=3)
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


@pytest.mark.parametrize("hears", [False, True], ids=["silent", "heard"])
def test_messages_run_ahead_of_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, misbehaving: Misbehaving, hears: bool
) -> None:
    """With a round under evaluation workers have the drafts of the next, made of what the first one predicts."""
    job = make_job(Request(shape=(3,), steps=STEPS, drafts=2), ModelSpec(), 2)
    t = [float(t) for t in job.solver.grid.timesteps]
    acknowledge(monkeypatch, misbehaving.leader, hears, size=1)
    leader = misbehaving.tell("gates", tmp_path, closed=[str(t[1]), str(t[2])])
    monkeypatch.setattr(leader.internals.placement, "core_placement", "shared")
    pending = leader.submit(shape=(3,), steps=STEPS, mode="aggressive", drafts=2)
    until(lambda: all(worker.drafts >= 2 for worker in leader.workers))  # 1 and 3, 2 and 4
    for place in (1, 2):
        (tmp_path / f"open {t[place]}").touch()
    assert torch.equal(pending.result(DEADLINE).samples, expected(drafts=2))


def test_only_workers_on_cores_are_silent() -> None:
    cores = parse_devices(2, 1)
    for devices, hears in ((cores, False), ([replace(device, gpu="GPU-0") for device in cores], True)):
        placement = MemoryPlacement(devices, ExecutionOptions(dispatch="async", memory="host"), 1)
        assert placement.workers_acknowledge == hears
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


def expected(mode: str = "aggressive", seed: int = 0, drafts: int = 2) -> torch.Tensor:
    return drp.reference(PLAIN, shape=(3,), steps=STEPS, mode=mode, drafts=drafts, seed=seed).samples


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


# What goes wrong.


@pytest.mark.parametrize(
    ("what", "words", "mode", "hears"),
    [
        ("kill", r"was killed by SIGKILL; its crash log is empty", "aggressive", False),
        ("kill", "SIGKILL", "conservative", True),
        ("hang", r"has not evaluated step \d+ of run \d+ within 3 s \(draft_timeout\)", "conservative", False),
        ("stale", "without a valid completion record", "rolling", False),
        ("early", "without a valid completion record", "aggressive", False),
        ("early", "without a valid completion record", "adaptive", True),
        ("assert", "device-side assert", "conservative", False),
    ],
)
def test_what_was_not_proven_is_computed_again(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    misbehaving: Misbehaving,
    what: str,
    words: str,
    mode: str,
    hears: bool,
) -> None:
    acknowledge(monkeypatch, misbehaving.leader, hears, size=1)
    mine, theirs = Steps(), Steps()
    leader = misbehaving.tell(what, tmp_path / "once")
    run = leader.submit(shape=(3,), steps=STEPS, mode=mode, callback=mine).result(DEADLINE)
    ref = drp.reference(PLAIN, shape=(3,), steps=STEPS, mode=mode, devices=2, callback=theirs)
    assert (tmp_path / "once").exists()
    assert torch.equal(run.samples, ref.samples)
    assert (run.rounds, run.evaluations) == (ref.rounds, ref.evaluations)
    assert mine.equals(theirs)  # each step once, and no state that was made of what was not there
    assert re.search(words, run.incidents[0])
    assert "went back to step" in run.incidents[1]
    assert len(run.incidents) == 2  # Who only waited for it is not blamed.
    until(lambda: [worker.state for worker in leader.workers] == ["ready"] * 2)
    after = leader.sample(shape=(3,), steps=STEPS, mode=mode)
    assert torch.equal(after.samples, ref.samples)
    assert not after.incidents


def test_no_state_is_handed_out_before_it_is_proven(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, misbehaving: Misbehaving
) -> None:
    """The leader sees late here that a stamp is none: when the states made of what was not there are long computed."""
    verdict = PendingCompletion.status.fget  # type: ignore[attr-defined]  # of a property

    def late(answer: PendingCompletion) -> int | None:
        seen: int | None = verdict(answer)
        return PENDING if seen is None and time.monotonic() < answer.since + 0.3 else seen

    monkeypatch.setattr(PendingCompletion, "status", property(late))
    mine, theirs = Steps(), Steps()
    leader = misbehaving.tell("early", tmp_path / "once")
    run = leader.submit(shape=(3,), steps=STEPS, callback=mine).result(DEADLINE)
    drp.reference(PLAIN, shape=(3,), steps=STEPS, devices=2, callback=theirs)
    assert "without a valid completion record" in run.incidents[0]
    assert mine.equals(theirs)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nan", r"worker \d .*failed evaluating step \d+ of run \d+: .*the denoiser returned NaN"),
        ("raise", r"worker \d .*failed evaluating step \d+ of run \d+: ArithmeticError: (.|\n)*in predict"),
        ("memory", r"worker \d .*failed evaluating step \d+ of run \d+: OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_what_the_denoiser_does_ends_its_run_only(
    tmp_path: Path, misbehaving: Misbehaving, what: str, words: str
) -> None:
    leader = misbehaving.tell(what, tmp_path / "once")
    before = [worker.losses for worker in leader.workers]
    with pytest.raises(WorkerError, match=words):
        leader.submit(shape=(3,), steps=STEPS).result(DEADLINE)
    assert torch.equal(leader.sample(shape=(3,), steps=STEPS).samples, expected())
    assert [worker.losses for worker in leader.workers] == before


def test_a_lost_context_ends_the_worker_of_a_synchronous_run_too(misbehaving: Misbehaving, tmp_path: Path) -> None:
    leader = misbehaving.tell("assert", tmp_path / "once")
    before = sum(worker.losses for worker in leader.workers)
    with dispatching(leader, "sync"):
        run = leader.sample(shape=(3,), steps=STEPS)
    assert run.dispatch == "sync"
    assert torch.equal(run.samples, expected())
    assert len(run.incidents) == 1
    assert "device-side assert triggered" in run.incidents[0]
    assert sum(worker.losses for worker in leader.workers) == before + 1


def test_a_callback_that_raises_ends_its_run_only(two: Leader) -> None:
    def refuse(k: int, x: torch.Tensor) -> None:
        if k == 5:
            raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        two.sample(labels=[1], steps=12, callback=refuse)
    assert torch.equal(
        two.sample(labels=[1], steps=12).samples, drp.reference(TINY, labels=[1], steps=12, devices=2).samples
    )


def test_closing_in_the_middle_waits_for_nobody(tmp_path: Path) -> None:
    before = leftovers()
    with misbehaving_workers(tmp_path, devices=1) as started:
        leader = started.tell("wait", tmp_path / "never")
        pending = leader.submit(shape=(3,), steps=STEPS)
        until(lambda: any(worker.drafts > 1 for worker in leader.workers))
    assert pending.cancelled() or pending.exception(DEADLINE) is not None
    assert not what_stays(before)


# What it refuses.


def test_what_cannot_be_is_refused(batched: Leader) -> None:
    with pytest.raises(ValueError, match="dispatch is 'gpu'; give 'auto', 'sync' or 'async'"):
        ExecutionOptions(dispatch="gpu")
    with pytest.raises(ValueError, match=r"hedge is 2\.0, but with dispatch=\"async\""):
        Leader(TINY, execution=DEVICE, policy=LoadAdaptive(hedge=2.0))
    with pytest.raises(ValueError, match=r"hedge is 1\.25"):
        Leader(TINY, execution=DEVICE, policy="hedged")
    with pytest.raises(ValueError, match=r"hedge is 1\.25"):
        batched.policy = "rolling-hedged"


# To whom, and who is told.


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

    def watched(worker_slot: DraftSlot, message: ToWorker) -> None:
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

    def bound(worker_slot: DraftSlot, number: int) -> bool:
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


def test_what_was_held_back_for_a_worker_that_is_lost_is_sent(misbehaving: Misbehaving) -> None:
    """The first worker never has its draft; the other has its own all the same, and is not taken for dead."""
    leader = misbehaving.leader
    before = [worker.losses for worker in leader.workers]
    pid = leader.workers[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    run = leader.submit(shape=(3,), steps=STEPS, mode="aggressive").result(DEADLINE)
    assert torch.equal(run.samples, expected())
    assert [worker.losses for worker in leader.workers] == [before[0] + 1, before[1]]


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


# Errors.


def test_errors_after_which_cuda_is_of_no_use() -> None:
    kinds: list[type[RuntimeError]] = [RuntimeError]
    if hasattr(torch, "AcceleratorError"):  # from torch 2.8 on
        kinds.append(torch.AcceleratorError)
    for kind in kinds:
        for ending in UNRECOVERABLE_ERRORS:
            assert is_unrecoverable(kind(f"CUDA error: {ending}\nCUDA kernel errors might be asynchronously reported"))
        assert not is_unrecoverable(kind("CUDA error: invalid argument"))
        assert not is_unrecoverable(kind("CUDA error: out of memory"))
        assert not is_unrecoverable(kind("CUDA error: no kernel image is available for execution on the device"))
    from drp.errors import CudaError

    assert is_unrecoverable(CudaError("cudaEventRecord failed: an illegal memory access was encountered (700)"))
    assert not is_unrecoverable(CudaError("cudaMalloc failed: out of memory (2)"))
    assert not is_unrecoverable(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_unrecoverable(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_unrecoverable(ValueError("CUDA error: device-side assert triggered"))
