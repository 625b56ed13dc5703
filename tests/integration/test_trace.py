"""Traces: valid by the format's rules, with everything that happened in them, and sums that agree with the bench."""

from __future__ import annotations

import json
import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from torch import Tensor

import drp
from bench.rounds import split
from drp import ExecutionOptions, Leader
from drp.cli import main
from drp.leader.events import Timeline, TraceEvent
from drp.trace import read, record, summarise
from tests.conftest import dispatching

Event = dict[str, Any]
EMULATED = "emulated:5ms:jitter=20%:values=cheap:link=300us"
CHEAP = "drp.workers.emulated:load"


def check_format(path: Path) -> list[Event]:
    """Hold a file to the rules of the Trace Event Format's JSON objects; return its events."""
    content = json.loads(path.read_text())
    assert content["displayTimeUnit"] in ("ms", "ns")
    events: list[Event] = content["traceEvents"]
    lanes: dict[tuple[int, int], list[Event]] = defaultdict(list)
    flows: dict[tuple[str, str, int], list[Event]] = defaultdict(list)
    nested: dict[tuple[str, str], list[Event]] = defaultdict(list)
    for event in events:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name", "process_sort_index")
            continue
        assert event["ts"] >= 0
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0
                lanes[event["pid"], event["tid"]].append(event)
            case "s" | "t" | "f":
                flows[event["cat"], event["name"], event["id"]].append(event)
            case "b" | "e":
                nested[event["cat"], event["id"]].append(event)
            case "i":
                assert event["s"] in ("g", "p", "t")
            case other:
                pytest.fail(f"phase {other!r} is not one that is written")
    named = {event["pid"] for event in events if event["name"] == "process_name"}
    assert {pid for pid, _ in lanes} <= named
    for slices in lanes.values():  # one in another, or apart
        ends: list[float] = []
        for event in sorted(slices, key=lambda e: (e["ts"], -e["dur"])):
            end = event["ts"] + event["dur"]
            while ends and ends[-1] <= event["ts"] + 1e-3:
                ends.pop()
            assert not ends or end <= ends[-1] + 1e-3, event
            ends.append(end)
    for flow in flows.values():
        phases = "".join(event["ph"] for event in flow)
        assert phases in ("stf", "sf"), phases
        assert [e["ts"] for e in flow] == sorted(e["ts"] for e in flow)
        assert flow[-1]["bp"] == "e"
        for event in flow:  # bound to the slice around it
            around = lanes[event["pid"], event["tid"]]
            assert any(s["ts"] - 1e-3 <= event["ts"] <= s["ts"] + s["dur"] + 1e-3 for s in around)
    for pairs in nested.values():
        assert "".join(event["ph"] for event in pairs) == "be" * (len(pairs) // 2)
    return events


def names(events: list[Event], phase: str) -> list[str]:
    return [event["name"] for event in events if event["ph"] == phase]


@pytest.fixture(scope="module")
def emulated() -> Iterator[Leader]:
    with Leader(CHEAP, devices=[EMULATED] * 2) as leader:
        yield leader


@pytest.fixture
def synchronous(emulated: Leader) -> Iterator[Leader]:
    with dispatching(emulated, "sync") as leader:
        yield leader


@pytest.mark.parametrize("mode", ["aggressive", "conservative", "adaptive", "rolling"])
def test_a_trace_is_valid_and_whole(emulated: Leader, mode: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with record(emulated, path) as marks:
        result = emulated.sample(shape=(4, 8, 8), steps=14, mode=mode, callback=lambda k, x: None)
        emulated.sample(shape=(4, 8, 8), steps=5, mode=mode)
    events = check_format(path)
    assert read(path) == (marks, emulated.devices, 0)
    slices = names(events, "X")
    total = [mark.kind for mark in marks].count("predicted")
    for part in ("receive", "compute", "copy", "reply", "send", "accumulate"):
        assert slices.count(part) == total
    assert slices.count("callback") == 14
    assert slices.count("last states") == 2
    assert slices.count("draft") == [mark.kind for mark in marks].count("scheduled")
    for phase in "stf":  # an arrow for each evaluation, to what was refined with it
        assert names(events, phase).count("step 3") == [m.step for m in marks if m.kind == "predicted"].count(3)
    assert sum(name.startswith("run ") for name in names(events, "b")) == 2
    assert total == result.evaluations + sum(mark.kind == "predicted" and mark.run != marks[0].run for mark in marks)


def test_cuts_are_shown(tiny: Leader, tmp_path: Path) -> None:
    with record(tiny, tmp_path / "run.json"):
        result = tiny.sample(labels=[1], steps=20, mode="adaptive", drafts=4, tolerance=1e-3)
    assert result.cuts
    events = check_format(tmp_path / "run.json")
    cuts = [event["args"]["step"] for event in events if event["name"] == "discarded"]
    assert cuts == list(result.cuts)


@pytest.mark.parametrize(("mode", "drafts"), [("aggressive", 2), ("conservative", 2), ("aggressive", 4)])
def test_sums_are_those_of_the_bench(synchronous: Leader, mode: str, drafts: int, tmp_path: Path) -> None:
    with record(synchronous, tmp_path / "run.json") as marks:
        synchronous.sample(shape=(4, 8, 8), steps=20, mode=mode, drafts=drafts)
    bench = split(marks)
    summary = summarise(*read(tmp_path / "run.json"))
    (path,) = summary.paths
    parts = path.compute + path.transfer + path.arithmetic + path.sending + path.queue + path.end
    assert parts == pytest.approx(path.wall) == pytest.approx(bench.wall)
    assert path.arithmetic == pytest.approx(sum(r.arithmetic for r in bench.rounds), rel=0.02)
    if drafts == 2:  # with more drafts than devices the bench adds up those of a device
        assert path.sending == pytest.approx(sum(r.sending for r in bench.rounds), rel=0.02)
        assert path.transfer == pytest.approx(sum(r.wire for r in bench.rounds), rel=0.02)
        assert path.compute == pytest.approx(bench.wall - path.transfer - path.leader, rel=0.02)
    assert [lane.total for lane in summary.workers] == [pytest.approx(bench.wall)] * 2
    assert sum(lane.evaluations for lane in summary.workers) == 20
    assert "1 run(s)" in summary.text


def test_the_path_of_an_asynchronous_run_has_each_evaluation_that_others_waited_for() -> None:
    """Evaluations are so short that the next draft is sent before the leader reads their completion records, by two."""
    timeline, microsecond = [TraceEvent("begin", 0, run=1)], 1000
    for k in range(6):
        began, ended, sent = 100 * k + 100, 100 * k + 160, max(5, 100 * k + 75)
        read = began + 80 + 100 * (k % 2 == 0) + k
        times = (began / 1e6, began / 1e6, ended / 1e6, ended / 1e6)
        timeline += [
            TraceEvent("scheduled", (sent - 5) * microsecond, run=1, since=(sent - 7) * microsecond, steps=(k,)),
            TraceEvent("sent", sent * microsecond, run=1, step=k, since=(sent - 2) * microsecond),
            TraceEvent("predicted", read * microsecond, run=1, step=k, seconds=60e-6, times=times),
        ]
    timeline.sort(key=lambda event: event.ns)
    timeline.append(TraceEvent("end", timeline[-1].ns + 10 * microsecond, run=1))
    (path,) = summarise(timeline, ["cpu"]).paths
    assert path.rounds == path.evaluations == 6
    assert path.compute == pytest.approx(6 * 60e-6)
    assert min(path.transfer, path.arithmetic, path.sending, path.end) >= 0
    assert path.compute + path.transfer + path.leader + path.queue == pytest.approx(path.wall)


def test_the_devices_of_an_asynchronous_run_wait_for_the_slowest() -> None:
    """Worker 1 takes half as long. The leader sends drafts ahead, and reads predictions when the next are under way."""
    timeline, ms = [TraceEvent("begin", 0, run=1)], 10**6
    for k in range(5):
        for worker, seconds in ((0, 0.010), (1, 0.005)):
            step, sent, began = 2 * k + worker, max(1, 10 * k - 8) * ms + worker, (10 * k + 2) * ms
            times = (began / 1e9, began / 1e9, began / 1e9 + seconds, began / 1e9 + seconds)
            timeline += [
                TraceEvent("scheduled", sent, run=1, steps=(step,)),
                TraceEvent("sent", sent, run=1, step=step, worker=worker, since=sent),
                TraceEvent(
                    "predicted", (10 * k + 15) * ms, run=1, step=step, worker=worker, seconds=seconds, times=times
                ),
            ]
    timeline.sort(key=lambda event: event.ns)
    timeline.append(TraceEvent("end", timeline[-1].ns + ms, run=1))
    slow, fast = summarise(timeline, ["cpu:0", "cpu:1"]).workers
    for device, computed, waited in ((slow, 0.050, 0.0), (fast, 0.025, 4 * 0.005)):
        assert device.total == pytest.approx(0.056)
        assert device.compute == pytest.approx(computed)
        assert device.waiting == pytest.approx(waited, abs=1.1e-3)


@pytest.mark.parametrize("dispatch", ["sync", "async"])
def test_the_devices_compute_as_long_as_their_evaluations_took(emulated: Leader, dispatch: str) -> None:
    timeline = Timeline()
    emulated.subscribe(timeline)
    with dispatching(emulated, dispatch):
        emulated.sample(shape=(4, 8, 8), steps=20, drafts=4)
    emulated.unsubscribe(timeline)
    for number, worker in enumerate(summarise(timeline, emulated.devices).workers):
        took = [event.seconds for event in timeline if event.kind == "predicted" and event.worker == number]
        assert worker.compute == pytest.approx(sum(took), rel=0.01)


@pytest.mark.parametrize("dispatch", ["sync", "async"])
def test_a_batch_is_one_of_the_consecutive_evaluations(dispatch: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    execution = ExecutionOptions(dispatch=dispatch)
    result = drp.sample("digits", labels=[1], drafts_per_device=2, steps=12, trace=path, execution=execution)
    (found,) = summarise(*read(path)).paths
    assert found.rounds == result.rounds < found.evaluations


@pytest.mark.parametrize("mode", ["sequential", "conservative"])
def test_the_path_of_a_run_is_as_long_as_its_rounds(tiny: Leader, mode: str) -> None:
    tiny.timeline = timeline = Timeline()
    with dispatching(tiny, "async"):
        result = tiny.sample(labels=[1], steps=8, mode=mode)
    tiny.timeline = None
    (path,) = summarise(timeline, tiny.devices).paths
    assert path.rounds == result.rounds


def test_a_trace_without_end_keeps_the_newest_runs_and_counts_the_others(emulated: Leader, tmp_path: Path) -> None:
    path, most, everything = tmp_path / "run.json", 200, Timeline()
    emulated.subscribe(everything)
    with record(emulated, path, most) as marks:
        for _ in range(8):
            emulated.sample(shape=(4, 8, 8), steps=14)
            assert len(marks) < most * 1.01
    emulated.unsubscribe(everything)
    kept, _, dropped = read(path)
    assert len(everything) > 2 * most
    assert [(mark.kind, *mark[2:5]) for mark in kept] == [(mark.kind, *mark[2:5]) for mark in everything[dropped:]]
    assert kept[0].kind == "begin"
    assert sum(mark.kind == "end" for mark in kept) >= 2
    check_format(path)
    assert f" {dropped} older events were dropped" in summarise(*read(path)).text
    with pytest.raises(ValueError, match="max_events is 0"), record(emulated, path, 0):
        pass


def test_a_trace_is_written_though_a_worker_is_killed_and_the_run_fails(emulated: Leader, tmp_path: Path) -> None:
    worker = emulated.workers[1]

    def kill_and_raise(k: int, x: Tensor) -> None:
        if k == 3:
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)
        if emulated.workers[1].losses > worker.losses:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"), record(emulated, tmp_path / "run.json"):
        emulated.sample(shape=(4, 8, 8), steps=900, callback=kill_and_raise)
    events = check_format(tmp_path / "run.json")
    assert "lost" in names(events, "X")
    summary = summarise(*read(tmp_path / "run.json"))
    assert not summary.paths
    assert sum(lane.lost for lane in summary.workers) >= 1
    assert summary.text == "No run has finished."


def test_only_what_is_recorded_is_kept(tiny: Leader, tmp_path: Path) -> None:
    with record(tiny, tmp_path / "none.json"):
        pass
    assert check_format(tmp_path / "none.json")
    assert tiny.timeline is None
    seen: list[Tensor] = []
    with pytest.raises(LookupError), record(tiny, tmp_path / "failed.json"):
        tiny.sample(labels=[1], steps=9, callback=lambda k, x: seen[k])  # type: ignore[arg-type]
    assert "failed" in names(check_format(tmp_path / "failed.json"), "i")


def test_a_place_that_cannot_be_written_is_refused_before_workers_start(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere" / "run.json"):
        with pytest.raises(ValueError, match="cannot be written"):
            drp.sample("digits", labels=[1], trace=place)


def test_the_command_line_summarises(synchronous: Leader, tmp_path: Path) -> None:
    with record(synchronous, tmp_path / "run.json"):
        synchronous.sample(shape=(4, 8, 8), steps=6, mode="sequential")
    said = CliRunner().invoke(main, ["trace", "summary", str(tmp_path / "run.json")])
    assert said.exit_code == 0, said.output
    assert "6 evaluations on 2 device(s), 6 consecutive evaluations per run" in said.output
    assert "How each device spent the time" in said.output
    shown = json.loads(CliRunner().invoke(main, ["trace", "summary", str(tmp_path / "run.json"), "--json"]).stdout)
    assert [(path["evaluations"], path["rounds"]) for path in shown["paths"]] == [(6, 6)]
    assert sum(each["evaluations"] for each in shown["workers"]) == 6
    (tmp_path / "other.json").write_text('{"traceEvents": []}')
    refused = CliRunner().invoke(main, ["trace", "summary", str(tmp_path / "other.json")])
    assert refused.exit_code == 1
    assert "other.json is not a trace written by drp" in refused.output
