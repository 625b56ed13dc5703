"""Answers ahead of the device, `GpuOptions(ordering="device")`, on the host: threads for streams, real processes.

What these share with a GPU is all but the streams themselves: the order of waits and records, stamps and what is proven
by them, what happens when they are not what they should be.
"""

from __future__ import annotations

import itertools
import json
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import drp
from drp import GpuOptions, Leader, WorkerError
from drp.leader.ahead import Answer
from drp.leader.devices import parse_devices
from drp.leader.ground import Ground
from drp.leader.lane import Lane, LaneRecord
from drp.leader.request import Request, make_job
from drp.leader.staff import Station
from drp.leader.timeline import Mark
from drp.protocol.bell import Bell, OwnBell
from drp.protocol.codec import ProtocolError
from drp.protocol.messages import ModelSpec, ToWorker
from drp.protocol.order import (
    FINE,
    LINE,
    NOT_FINITE,
    RAISED,
    REACHED,
    RING,
    STAMP,
    UNREAD,
    Line,
    stamp,
    verdict_of,
    word,
)
from drp.sampling.run import Task
from drp.workers.ahead import HostRecord, HostStream
from drp.workers.lasting import ENDINGS, is_lasting
from tests.conftest import leftovers, what_stays

pytestmark = pytest.mark.timeout(180)

DEVICE = GpuOptions(ordering="device")
TINY = "tests.denoisers:Tiny"
MODEL = "tests.misbehaving:make"
PLAIN = "tests.misbehaving:make_plain"
MODES = ("sequential", "conservative", "aggressive", "rolling", "adaptive")
STEPS = 20
DEADLINE = 60.0


@pytest.fixture(autouse=True)
def _leave_nothing_at_all() -> Iterator[None]:
    before = leftovers()
    yield
    assert not what_stays(before)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def misbehaving(
    monkeypatch: pytest.MonkeyPatch, path: Path, what: str, gpu: GpuOptions = DEVICE, **told: object
) -> Iterator[Leader]:
    monkeypatch.setenv("DRP_TEST_ONCE", json.dumps({"what": what, "path": str(path), **told}))
    with Leader(MODEL, devices=2, draft_timeout=3.0, gpu=gpu) as leader:
        monkeypatch.delenv("DRP_TEST_ONCE")
        yield leader


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


@pytest.fixture(params=[False, True], ids=["silent", "heard"])
def heard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Workers say that a draft is queued, as those have to whose records have no numbers, or they do not."""
    monkeypatch.setattr(Ground, "hears", request.param)
    return bool(request.param)


@pytest.mark.parametrize(("devices", "batch"), [(1, 1), (2, 3), (4, 1)])
@pytest.mark.usefixtures("heard")
def test_bits_callbacks_and_residuals_are_the_references(devices: int, batch: int) -> None:
    with Leader(TINY, devices=devices, drafts_per_device=batch, gpu=DEVICE) as leader:
        for mode in MODES:
            mine, theirs = Steps(), Steps()
            options = {"labels": [1, 2], "steps": 14, "mode": mode, "residuals": True}
            run = leader.sample(**options, callback=mine)  # type: ignore[arg-type]  # types are lost in the dict
            ref = drp.reference(TINY, **options, callback=theirs, devices=devices, drafts_per_device=batch)  # type: ignore[arg-type]  # likewise
            assert torch.equal(run.samples, ref.samples), mode
            assert (run.rounds, run.evaluations, run.incidents) == (ref.rounds, ref.evaluations, ())
            assert (run.residuals, run.cuts) == (ref.residuals, ref.cuts)
            assert [k for k, _ in mine.given] == list(range(1, 15))
            assert mine.equals(theirs), mode
            assert run.device_seconds > 0  # which come with the stamps


def test_solvers_with_noise_or_a_memory() -> None:
    with Leader(TINY, devices=3, gpu=DEVICE) as leader:
        for solver, mode in itertools.product(("ddpm", "dpmsolver++", "unipc"), ("conservative", "aggressive")):
            run = leader.sample(labels=[4], steps=15, mode=mode, solver=solver)
            ref = drp.reference(TINY, labels=[4], steps=15, mode=mode, solver=solver, devices=3)
            assert torch.equal(run.samples, ref.samples), (solver, mode)


@pytest.mark.usefixtures("heard")
def test_messages_run_ahead_of_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With nothing evaluated yet workers have drafts of two more rounds, made of what the first one predicts."""
    gate = tmp_path / "open"
    with misbehaving(monkeypatch, gate, "wait") as leader:
        pending = leader.submit(shape=(3,), steps=STEPS, mode="aggressive", drafts=2)
        until(lambda: [worker.drafts for worker in leader.workers] == [3, 1])  # 0, 1 and 3, 2: no room for 4
        gate.touch()
        assert torch.equal(pending.result(DEADLINE).samples, expected(drafts=2))


def test_only_workers_on_cores_are_silent() -> None:
    cores = parse_devices(2, 1)
    for devices, hears in ((cores, False), ([replace(device, gpu="GPU-0") for device in cores], True)):
        ground = Ground(devices, GpuOptions(ordering="device", memory="host"), 1)
        assert ground.hears == hears
        ground.close()


@pytest.mark.parametrize(("seconds", "most"), [(0.0, 4), (1000.0, 16)])
def test_workers_are_given_more_at_once_where_that_is_soon_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: float, most: int
) -> None:
    """Of two rounds, or of several times as many; a run that is cancelled then lets go of its memory all the same."""
    monkeypatch.setattr("drp.leader.ahead.LONG", seconds)
    job = make_job(Request(shape=(3,), steps=STEPS, drafts=2), ModelSpec(), 2)
    t = [float(t) for t in job.solver.grid.timesteps]
    with misbehaving(monkeypatch, tmp_path, "gates", closed=[str(t[1]), str(t[2])]) as leader:
        given = list[int]()
        leader.timeline = []
        pending = leader.submit(shape=(3,), steps=STEPS, mode="aggressive", drafts=2)

        def full() -> bool:
            given.append(sum(worker.drafts for worker in leader.workers))
            return any(mark.what == "answer" for mark in leader.timeline or []) and given[-1] == most

        until(full)
        time.sleep(0.2)
        assert max(given) == most
        assert sum(worker.drafts for worker in leader.workers) == most
        pending.cancel()
        for place in (1, 2):
            (tmp_path / f"open {t[place]}").touch()
        carried = leader._engine._carried
        until(lambda: pending.done() and not carried.under_way and not carried.leaving)
        assert torch.equal(leader.sample(shape=(3,), steps=STEPS, drafts=2).samples, expected(drafts=2))


def test_drafts_of_a_round_do_not_wait_for_one_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The second of two is sent long after the first was answered, and its stream does not wait for the first one's."""
    job = make_job(Request(shape=(3,), steps=STEPS, drafts=2), ModelSpec(), 2)
    t = [float(t) for t in job.solver.grid.timesteps]
    with misbehaving(monkeypatch, tmp_path, "gates", closed=[str(t[0]), str(t[3])]) as leader:
        pending = leader.submit(shape=(3,), steps=STEPS, mode="aggressive", drafts=2)
        until(lambda: [worker.drafts for worker in leader.workers] == [3, 1])  # 0, 1 and 3, 2: no room for 4
        (tmp_path / f"open {t[0]}").touch()
        until(lambda: (tmp_path / f"at {t[4]}").exists())
        assert not pending.done()
        (tmp_path / f"open {t[3]}").touch()
        run = pending.result(DEADLINE)
        assert not run.incidents  # and the first was not given up meanwhile
        assert torch.equal(run.samples, expected())


def expected(mode: str = "aggressive", seed: int = 0, drafts: int = 2) -> torch.Tensor:
    return drp.reference(PLAIN, shape=(3,), steps=STEPS, mode=mode, drafts=drafts, seed=seed).samples


def test_several_runs_and_some_that_are_cancelled() -> None:
    with Leader("tests.denoisers:make_slow_sine", devices=2, gpu=DEVICE) as leader:
        options = {"shape": (3,), "steps": 12, "mode": "conservative"}
        pending = [leader.submit(**options, seed=seed) for seed in range(6)]  # type: ignore[arg-type]  # types are lost in the dict
        for cancelled in pending[1::2]:
            cancelled.cancel()
        for seed in (0, 2, 4):
            ref = drp.reference("tests.denoisers:make_slow_sine", **options, devices=2, seed=seed)  # type: ignore[arg-type]  # likewise
            assert torch.equal(pending[seed].result(DEADLINE).samples, ref.samples)
        until(lambda: all(worker.drafts == 0 for worker in leader.workers))


def test_a_session_waits_on_the_host_beside_runs() -> None:
    with Leader(TINY, devices=2, gpu=DEVICE) as leader:
        pending = leader.submit(labels=[1], steps=30)
        x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
        session = leader.open({"x": x}, {"x": x}, 2, {"labels": torch.tensor([3])})
        for _ in range(5):
            session.arena.drafts[0] = x.reshape(-1)
            rows = session.evaluate([Task(0, 400.0, 0)])
            made = session.arena.predictions[rows[0]].clone()
        session.close()
        assert torch.equal(
            pending.result(DEADLINE).samples, drp.reference(TINY, labels=[1], steps=30, devices=2).samples
        )
    with Leader(TINY, devices=1) as leader:
        session = leader.open({"x": x}, {"x": x}, 2, {"labels": torch.tensor([3])})
        session.arena.drafts[0] = x.reshape(-1)
        rows = session.evaluate([Task(0, 400.0, 0)])
        assert torch.equal(session.arena.predictions[rows[0]], made)
        session.close()


def test_emulated_devices_take_their_time_and_say_so() -> None:
    with Leader(TINY, devices="2xemulated:5ms", gpu=DEVICE) as leader:
        leader.timeline = []
        run = leader.sample(labels=[2], steps=10, mode="aggressive")
        assert torch.equal(run.samples, drp.reference(TINY, labels=[2], steps=10, mode="aggressive", devices=2).samples)
        assert run.device_seconds == pytest.approx(10 * 0.005, rel=0.5)
        from drp.trace.summary import summarise

        path = summarise(leader.timeline, leader.devices).paths[0]
        parts = path.compute + path.transfer + path.leader + path.queue
        assert parts == pytest.approx(path.wall)


# What goes wrong.


@pytest.mark.parametrize(
    ("what", "words", "mode", "hears"),
    [
        ("kill", "SIGKILL", "aggressive", False),
        ("kill", "SIGKILL", "conservative", True),
        ("kill", "SIGKILL", "adaptive", False),
        ("hang", "draft_timeout", "conservative", False),
        ("stale", "did not stamp it", "rolling", False),
        ("early", "did not stamp it", "aggressive", False),
        ("early", "did not stamp it", "adaptive", True),
        ("assert", "device-side assert", "conservative", False),
    ],
)
def test_what_was_not_proven_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, words: str, mode: str, hears: bool
) -> None:
    monkeypatch.setattr(Ground, "hears", hears)
    mine, theirs = Steps(), Steps()
    with misbehaving(monkeypatch, tmp_path / "once", what) as leader:
        pending = leader.submit(shape=(3,), steps=STEPS, mode=mode, callback=mine)
        run = pending.result(DEADLINE)
        ref = drp.reference(PLAIN, shape=(3,), steps=STEPS, mode=mode, devices=2, callback=theirs)
        assert (tmp_path / "once").exists()
        assert torch.equal(run.samples, ref.samples)
        assert (run.rounds, run.evaluations) == (ref.rounds, ref.evaluations)
        assert mine.equals(theirs)  # each step once, and no state that was made of what was not there
        assert re.search(words, run.incidents[0])
        assert "began again" in run.incidents[1]
        assert len(run.incidents) == 2  # Who only waited for it is not blamed.
        until(lambda: [worker.state for worker in leader.workers] == ["ready"] * 2)
        after = leader.sample(shape=(3,), steps=STEPS, mode=mode)
        assert torch.equal(after.samples, ref.samples)
        assert not after.incidents


def test_no_state_is_handed_out_before_it_is_proven(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The leader sees late here that a stamp is none: when the states made of what was not there are long computed."""
    verdict = Answer.verdict.fget  # type: ignore[attr-defined]  # of a property

    def late(answer: Answer) -> int | None:
        seen: int | None = verdict(answer)
        return UNREAD if seen is None and time.monotonic() < answer.since + 0.3 else seen

    monkeypatch.setattr(Answer, "verdict", property(late))
    mine, theirs = Steps(), Steps()
    with misbehaving(monkeypatch, tmp_path / "once", "early") as leader:
        run = leader.submit(shape=(3,), steps=STEPS, callback=mine).result(DEADLINE)
        drp.reference(PLAIN, shape=(3,), steps=STEPS, devices=2, callback=theirs)
        assert "did not stamp it" in run.incidents[0]
        assert mine.equals(theirs)


def test_one_that_always_dies_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with misbehaving(monkeypatch, tmp_path / "once", "assert", always=True) as leader:
        # Those who take their places find the same.
        monkeypatch.setenv("DRP_TEST_ONCE", json.dumps({"what": "assert", "path": str(tmp_path / "once"), "always": 1}))
        pending = leader.submit(shape=(3,), steps=STEPS)
        with pytest.raises(WorkerError, match=r"step \d+ of run 0 was given up(.|\n)*device-side assert"):
            pending.result(DEADLINE)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nan", r"worker \d .*failed evaluating step \d+ of run 0: .*the denoiser returned NaN"),
        ("raise", r"worker \d .*failed evaluating step \d+ of run 0: ArithmeticError: (.|\n)*in predict"),
        ("memory", r"worker \d .*failed evaluating step \d+ of run 0: OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_what_the_denoiser_does_ends_its_run_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, what: str, words: str
) -> None:
    with misbehaving(monkeypatch, tmp_path / "once", what) as leader:
        with pytest.raises(WorkerError, match=words):
            leader.submit(shape=(3,), steps=STEPS).result(DEADLINE)
        assert torch.equal(leader.sample(shape=(3,), steps=STEPS).samples, expected())
        assert [worker.lost for worker in leader.workers] == [0, 0]


def test_a_lost_context_ends_the_worker_with_ordering_host_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with misbehaving(monkeypatch, tmp_path / "once", "assert", GpuOptions()) as leader:
        run = leader.sample(shape=(3,), steps=STEPS)
        assert torch.equal(run.samples, expected())
        assert len(run.incidents) == 1
        assert "device-side assert triggered" in run.incidents[0]
        assert sorted(worker.lost for worker in leader.workers) == [0, 1]


def test_a_callback_that_raises_ends_its_run_only() -> None:
    def refuse(k: int, x: torch.Tensor) -> None:
        if k == 5:
            raise KeyError("the caller's own")

    with Leader(TINY, devices=2, gpu=DEVICE) as leader:
        with pytest.raises(KeyError, match="the caller's own"):
            leader.sample(labels=[1], steps=12, callback=refuse)
        assert torch.equal(
            leader.sample(labels=[1], steps=12).samples, drp.reference(TINY, labels=[1], steps=12, devices=2).samples
        )


def test_closing_in_the_middle_waits_for_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with misbehaving(monkeypatch, tmp_path / "never", "wait") as leader:
        pending = leader.submit(shape=(3,), steps=STEPS)
        until(lambda: any(worker.drafts > 1 for worker in leader.workers))
    assert pending.cancelled() or pending.exception(DEADLINE) is not None


# What it refuses.


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="ordering is 'gpu'; give 'host' or 'device'"):
        GpuOptions(ordering="gpu")
    with pytest.raises(ValueError, match=r"hedge is 2\.0, but with ordering=\"device\""):
        Leader(TINY, gpu=DEVICE, hedge=2.0)
    with pytest.raises(ValueError, match=r"hedge is 1\.25"):
        Leader(TINY, gpu=DEVICE, policy="hedged")
    with Leader(TINY, gpu=DEVICE) as leader, pytest.raises(ValueError, match=r"hedge is 1\.25"):
        leader.policy = "rolling-hedged"


# The parts.


def test_a_workers_stream_does_in_order_and_says_whether_it_is_done() -> None:
    stream, done, gate = HostStream(), list[int](), threading.Event()
    stream.put(lambda: gate.wait(DEADLINE))
    for number in range(5):
        stream.put(lambda number=number: done.append(number))  # type: ignore[misc]  # a default is its own type
    assert stream.busy
    gate.set()
    stream.settle()
    assert not stream.busy
    assert done == [0, 1, 2, 3, 4]
    stream.put(lambda: [][0])
    until(lambda: not stream._thread.is_alive())
    with pytest.raises(IndexError):
        stream.put(lambda: None)
    stream.close()


def test_a_lane_goes_as_far_as_it_can_and_says_when_to_go_on() -> None:
    lane, line, done = Lane(), Line(zeros()), list[str]()
    lane.put(lambda: done.append("first"))
    lane.wait(line, 1, told=True)
    lane.put(lambda: done.append("second"))
    mark = lane.mark()
    began = time.perf_counter()
    due = lane.go()
    assert done == ["first"]
    assert due is not None
    assert began < due  # somebody rings before; if not, it is looked at again
    assert not lane.passed(mark)
    assert line.reach(1, time.perf_counter_ns() + 10**10)  # and that was wanted
    assert lane.go() == pytest.approx(began + 10, abs=DEADLINE / 10)
    line.reach(1, time.perf_counter_ns())
    assert lane.go() is None
    assert done == ["first", "second"]
    assert lane.passed(mark)
    lane.settle()
    lane.wait(line, 2, told=True)
    with pytest.raises(RuntimeError, match="waits for another process"):
        lane.settle()
    lane.put(lambda: [][0])
    line.release()
    line.reach(2, 0)
    with pytest.raises(IndexError):
        lane.go()
    assert lane.go() is None  # What raised is not done again.


def zeros() -> torch.Tensor:
    return torch.zeros(LINE // 8, dtype=torch.int64)


def test_a_record_waits_for_what_was_recorded_when_it_was_asked() -> None:
    """The leader's lane and a worker's thread, on the same lines; the worker rings when it is wanted."""
    leaders, workers, rung = zeros(), zeros(), threading.Event()
    lane, stream, seen = Lane(), HostStream(), list[str]()
    mine, theirs = LaneRecord(leaders, lane), LaneRecord(workers, lane, told=True)
    its_leaders, its_own = HostRecord(leaders, stream), HostRecord(workers, stream, rung.set)
    its_leaders.wait(0)  # Nothing was recorded: it is none.
    stream.settle()
    lane.put(lambda: seen.append("written"))
    its_leaders.wait(mine.record())
    stream.put(lambda: seen.append("read"))
    its_own.record()
    theirs.wait()
    lane.put(lambda: seen.append("back"))
    time.sleep(0.02)
    assert seen == []
    assert leaders[REACHED] == 0
    assert lane.go() is not None
    assert rung.wait(DEADLINE)
    stream.settle()
    assert lane.go() is None
    assert seen == ["written", "read", "back"]
    stream.close()


def test_what_a_device_does_later_is_waited_for_and_taken_over() -> None:
    """A worker's thread goes on with the device's time, and the leader's waits for it: even if it was seen late."""
    leaders, workers = zeros(), zeros()
    stream, lane = HostStream(), Lane()
    HostRecord(leaders, stream).wait(0)
    own, theirs = HostRecord(workers, stream), LaneRecord(workers, lane, told=True)
    began = time.perf_counter_ns()
    for turn in range(3):
        stream.put(lambda turn=turn: setattr(stream, "time", began + (turn + 1) * 10**8))  # type: ignore[misc]  # a default is its own type
        own.record()
        theirs.wait()
        lane.put(lambda: ends.append(time.perf_counter_ns()))
    ends: list[int] = []
    while (due := lane.go()) is not None:
        time.sleep(max(0.0, min(due - time.perf_counter(), 0.01)))
    assert all(end >= began + (turn + 1) * 10**8 for turn, end in enumerate(ends))
    assert len(ends) == 3
    stream.settle()
    assert time.perf_counter_ns() >= began + 3 * 10**8
    stream.close()


def test_more_records_than_there_are_times_for_wait_for_the_oldest() -> None:
    line, stream = zeros(), HostStream()
    own, began = HostRecord(line, stream), time.perf_counter_ns()
    stream.put(lambda: setattr(stream, "time", began + 3 * 10**8))
    for _ in range(RING + 1):
        own.record()
    until(lambda: int(line[REACHED]) == RING)
    assert time.perf_counter_ns() < began + 3 * 10**8
    stream.settle()
    assert time.perf_counter_ns() >= began + 3 * 10**8
    assert int(line[REACHED]) == RING + 1
    stream.close()


def test_a_wait_ends_with_a_release_or_with_its_stream() -> None:
    workers, lane = zeros(), Lane()
    workers[REACHED] = 4
    record = LaneRecord(workers, lane, told=True)
    record.wait()
    assert lane.go() is not None
    record.release()
    assert lane.go() is None
    assert workers[REACHED] == 5  # from where another goes on
    stream, leaders = HostStream(), zeros()
    HostRecord(leaders, stream).wait(9)
    time.sleep(0.05)
    assert stream.busy
    stream.close()
    assert not stream._thread.is_alive()


def test_a_bell_rings_in_another_process_and_never_blocks() -> None:
    mine = OwnBell()
    code = "import sys; from drp.protocol.bell import Bell; from drp.protocol.messages import End\n"
    code += "bell = Bell(End(int(sys.argv[1]), int(sys.argv[2])))\nfor _ in range(100_000): bell.ring()\n"
    ends = [str(number) for number in (mine.end.pid, mine.end.fd)]
    subprocess.run([sys.executable, "-c", code, *ends], timeout=DEADLINE, check=True)
    assert select.select([mine.fd], [], [], 0)[0]
    while select.select([mine.fd], [], [], 0)[0]:
        mine.quiet()
    mine.quiet()  # Nobody rang.
    end = mine.end
    mine.close()
    with pytest.raises(ProtocolError, match="bell"):
        Bell(end)


def test_drafts_of_a_round_go_to_different_workers_and_the_first_is_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever they have of other rounds; so one worker is as good as another only if they are needed."""
    given: dict[int, int] = {}
    with Leader(TINY, devices=3, gpu=DEVICE) as leader:
        for mode, drafts in (("conservative", 3), ("aggressive", 2), ("sequential", 1)):
            timeline = list[Mark]()
            leader.timeline = timeline
            leader.sample(labels=[1], steps=30, mode=mode, drafts=drafts)
            rounds = [mark.steps for mark in timeline if mark.what == "formed"]
            given = {mark.step: mark.worker for mark in timeline if mark.what == "sent"}
            assert all(len({given[step] for step in steps}) == len(steps) for steps in rounds), mode
    assert set(given.values()) == {0}


def test_workers_are_bound_when_they_are_needed() -> None:
    with Leader(TINY, devices=2, gpu=DEVICE) as leader:
        sent = list[tuple[str, int]]()
        send = leader._engine._staff.send

        def watched(station: Station, message: ToWorker) -> None:
            sent.append((type(message).__name__, station.number))
            send(station, message)

        leader._engine._staff.send = watched  # type: ignore[method-assign]  # a spy
        leader.sample(labels=[1], steps=4, mode="sequential")
        until(lambda: ("Unbind", 0) in sent)
    assert [what for what in sent if what[0] == "Bind"] == [("Bind", 0)]
    assert ("Draft", 1) not in sent


def test_a_stamp_is_of_one_draft_and_says_whether_its_numbers_are() -> None:
    place = torch.zeros(STAMP, dtype=torch.int64)
    assert verdict_of(int(place[0]), 1) is None
    for sequence, output in itertools.product((1, 2**48), (torch.ones(3), torch.tensor([1.0, torch.nan]))):
        stamp(place, sequence, [torch.zeros(2), output], 50, 2**60)
        finite = bool(output.isfinite().all())
        assert verdict_of(int(place[0]), sequence) == (FINE if finite else NOT_FINITE)
        assert verdict_of(int(place[0]), sequence - 1) is None
        assert verdict_of(int(place[0]), sequence + 1) is None
        assert place[1:].tolist() == [50, 2**60]
    assert verdict_of(word(5, RAISED), 5) == RAISED
    assert verdict_of(UNREAD, 0) is None


def test_errors_after_which_cuda_is_of_no_use() -> None:
    kinds: list[type[RuntimeError]] = [RuntimeError]
    if hasattr(torch, "AcceleratorError"):  # from torch 2.8 on
        kinds.append(torch.AcceleratorError)
    for kind in kinds:
        for ending in ENDINGS:
            assert is_lasting(kind(f"CUDA error: {ending}\nCUDA kernel errors might be asynchronously reported"))
        assert not is_lasting(kind("CUDA error: invalid argument"))
        assert not is_lasting(kind("CUDA error: out of memory"))
        assert not is_lasting(kind("CUDA error: no kernel image is available for execution on the device"))
    from drp.protocol.cuda import CudaError

    assert is_lasting(CudaError("cudaEventRecord failed: an illegal memory access was encountered (700)"))
    assert not is_lasting(CudaError("cudaMalloc failed: out of memory (2)"))
    assert not is_lasting(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_lasting(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lasting(ValueError("CUDA error: device-side assert triggered"))
