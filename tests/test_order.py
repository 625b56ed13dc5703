"""The parts of answers ahead of the device on the host: lanes and streams, records, who is told of them, stamps."""

from __future__ import annotations

import dataclasses
import itertools
import os
import select
import subprocess
import sys
import threading
import time

import pytest
import torch

from drp import GpuOptions
from drp.leader.devices import parse_devices
from drp.leader.ground import Ground
from drp.leader.lane import Lane, LaneRecord, Room, _Reach
from drp.protocol.arena import Arena
from drp.protocol.bell import Bell, OwnBell
from drp.protocol.codec import ProtocolError
from drp.protocol.memory import SharedMemory
from drp.protocol.messages import Draft, Order
from drp.protocol.order import (
    FINE,
    LINE,
    NOT_FINITE,
    RAISED,
    REACHED,
    RING,
    STAMP,
    UNREAD,
    UNWANTED,
    Line,
    Lines,
    is_finite,
    stamp,
    stamp_now,
    verdict_of,
    word,
)
from drp.workers.ahead import HostAhead, HostLeaders, HostOwn, HostStream, Work
from drp.workers.emulated import Times
from tests.conftest import until

DEVICE = GpuOptions(ordering="device")
DEADLINE = 60.0


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
    line.reach(1, time.perf_counter_ns() + 10**10)
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


def own(line: torch.Tensor, stream: HostStream, bell: Bell | None = None) -> HostOwn:
    """The records of the only worker."""
    return HostOwn(line[None], Order(0, 0, 1, 0, False), stream, bell)


def test_a_record_waits_for_what_was_recorded_when_it_was_asked() -> None:
    """The leader's lane and a worker's thread, on the same lines; the worker rings when it is wanted."""
    leaders, workers, rung = zeros(), zeros(), OwnBell()
    lane, stream, seen = Lane(), HostStream(), list[str]()
    mine, theirs = LaneRecord(leaders, lane), LaneRecord(workers, lane, told=True)
    bell = Bell(rung.end)
    its_leaders, its_own = HostLeaders(leaders, stream, 0.0), own(workers, stream, bell)
    its_leaders.wait(0)  # Nothing was recorded: it is none.
    stream.settle()
    lane.put(lambda: seen.append("written"))
    its_leaders.wait(mine.record())
    gate = threading.Event()
    stream.put(lambda: seen.append("read"))
    stream.put(lambda: gate.wait(DEADLINE))
    its_own.record()
    theirs.wait()
    lane.put(lambda: seen.append("back"))
    time.sleep(0.02)
    assert seen == []
    assert leaders[REACHED] == 0
    assert lane.go() is not None
    gate.set()
    assert select.select([rung.fd], [], [], DEADLINE)[0]
    stream.settle()
    assert lane.go() is None
    assert seen == ["written", "read", "back"]
    stream.close()
    bell.close()
    rung.close()


def test_what_a_device_does_later_is_waited_for_and_taken_over() -> None:
    """A worker's thread goes on with the device's time, and the leader's waits for it: even if it was seen late."""
    leaders, workers = zeros(), zeros()
    stream, lane = HostStream(), Lane()
    HostLeaders(leaders, stream, 0.0).wait(0)
    its, theirs = own(workers, stream), LaneRecord(workers, lane, told=True)
    began = time.perf_counter_ns()
    for turn in range(3):
        stream.put(lambda turn=turn: setattr(stream, "time", began + (turn + 1) * 10**8))  # type: ignore[misc]  # a default is its own type
        its.record()
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
    its, began = own(line, stream), time.perf_counter_ns()
    stream.put(lambda: setattr(stream, "time", began + 3 * 10**8))
    for _ in range(RING + 1):
        its.record()
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
    HostLeaders(leaders, stream, 0.0).wait(9)
    time.sleep(0.05)
    assert stream.busy
    stream.close()
    assert not stream._thread.is_alive()


class Three:
    """Three workers' lines, and a lane that waits for them before it records again."""

    def __init__(self, room: Room) -> None:
        self.numbers = torch.zeros((3, LINE // 8), dtype=torch.int64)
        self.lines, self.seen = [Line(line) for line in self.numbers], Lines(self.numbers)
        self.lane, self.leaders = Lane(room), Line(zeros())
        self.counts, self.reached = [0, 0, 0], [0, 0, 0]

    def wait(self, *workers: int) -> None:
        """Have the lane wait for the next record of each, and then record."""
        for worker in workers:
            self.counts[worker] += 1
            self.lane.wait(self.lines[worker], self.counts[worker], told=True)
        self.lane.put(_Reach(self.leaders, self.leaders.count()))

    def reach(self, worker: int) -> str:
        """Have a worker come to its next record; return whom it tells, and why."""
        self.reached[worker] += 1
        self.lines[worker].reach(self.reached[worker], time.perf_counter_ns())
        return self.seen.told(worker, self.reached[worker])


def test_a_leader_with_a_core_of_its_own_is_told_of_each_record_in_turn() -> None:
    three = Three("own")
    for order in ((0, 1, 2), (2, 1, 0), (1, 1, 1)):
        three.wait(*order)
        for worker in order:
            assert three.lane.go() is not None
            assert not three.lane.has_core
            assert three.reach(worker) == "alone", order
        assert three.lane.go() is None


def test_a_leader_that_shares_cores_is_told_once_all_are_done() -> None:
    three = Three("shared")
    for order in ((0, 1, 2), (2, 0, 1), (1, 2)):
        three.wait(*order)
        assert three.lane.go() is not None
        assert [three.reach(worker) for worker in order] == [*[""] * (len(order) - 1), "last"], order
        assert three.lane.go() is None


def test_a_leader_is_lent_the_cores_of_the_first_that_is_done() -> None:
    """Who is done later tells nobody, however late the leader wakes up; if that takes too long, the last one does."""
    three = Three("lent")
    for group, order in (((0, 1, 2), (1, 0, 2)), ((0, 2), (2, 0)), ((1, 2), (1, 2)), ((0, 1, 2), (0, 1, 2))):
        three.wait(*group)
        assert three.lane.go(alone=True) is not None
        assert not three.lane.has_core
        assert three.reach(order[0]) == "alone", group
        assert three.lane.has_core
        assert [three.reach(worker) for worker in order[1:-1]] == [""] * (len(order) - 2)
        assert not three.lane.spin(0.0)
        assert three.lane.has_core
        if group == (0, 2):
            three.lane.leave_core()
            assert not three.lane.has_core
            assert three.lane.go(alone=True) is not None
            assert three.reach(order[-1]) == "last"
        else:
            assert three.reach(order[-1]) == ""
            assert three.lane.spin(0.0)
        assert not three.lane.has_core
        assert three.lane.go(alone=True) is None
    three.wait(1)  # Nobody else is waited for, so nobody's cores are free.
    assert three.lane.go(alone=True) is not None
    assert three.reach(1) == "last"
    assert three.lane.go(alone=True) is None
    three.wait(0, 1)  # Nor if workers may have another run.
    assert three.lane.go(alone=False) is not None
    assert [three.reach(0), three.reach(1)] == ["", "last"]


def test_of_workers_that_are_done_at_the_same_time_just_one_tells() -> None:
    three = Three("lent")
    three.wait(0, 1, 2)
    three.lane.go(alone=True)
    for worker in (0, 1, 2):
        three.lines[worker].reach(1, 1000)
    assert [three.seen.told(worker, 1) for worker in (0, 1, 2)] == ["alone", "", ""]


def test_where_the_leader_runs_follows_from_the_cores() -> None:
    """Workers lend their cores only where each has its own and there are no others, and awake only on their own."""
    cores = len(os.sched_getaffinity(0))
    for names, room, awake in (
        (f"{cores}xcpu", "lent" if cores > 1 else "shared", True),
        (f"{cores + 1}xcpu", "shared", False),
        (f"{cores}xemulated:1ms", "shared", False),
        (f"{cores - 1 or 1}xcpu", "own" if cores > 1 else "shared", True),
    ):
        ground = Ground(parse_devices(names, 1), DEVICE, 1)
        assert (ground._room, ground.awake > 0) == (room, awake), names
        ground.close()


def test_the_leaders_thread_is_moved_where_a_worker_lends_it_its_cores() -> None:
    cores = sorted(os.sched_getaffinity(0))
    moved = list[set[int]]()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, args=(DEADLINE,))
    thread.start()
    try:
        assert thread.native_id is not None
        for core in (cores[0], cores[-1]):
            code = f"import os; os.sched_setaffinity(0, {{{core}}}); from drp.protocol.waiting import lend_cores; "
            code += f"lend_cores({thread.native_id}); lend_cores(2**22 + 1)"  # the second is nobody, which is no error
            subprocess.run([sys.executable, "-c", code], timeout=DEADLINE, check=True)
            moved.append(os.sched_getaffinity(thread.native_id))
    finally:
        stop.set()
        thread.join()
    assert moved == [{cores[0]}, {cores[-1]}]


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


@pytest.mark.parametrize("now", [False, True])
def test_a_stamp_is_of_one_draft_and_says_whether_its_numbers_are(now: bool) -> None:
    places = torch.zeros((2, STAMP), dtype=torch.int64)
    place = places[1]
    assert verdict_of(int(place[0]), 1) is None
    for sequence, output in itertools.product((1, 2**48), (torch.ones(3), torch.tensor([1.0, torch.nan]))):
        if now:
            stamp_now(places.numpy().data, 1, sequence, [torch.zeros(2), output], 50, 2**60)
        else:
            stamp(place, sequence, [torch.zeros(2), output], 50, 2**60)
        finite = bool(output.isfinite().all())
        assert verdict_of(int(place[0]), sequence) == (FINE if finite else NOT_FINITE)
        assert verdict_of(int(place[0]), sequence - 1) is None
        assert verdict_of(int(place[0]), sequence + 1) is None
        assert place[1:].tolist() == [50, 2**60]
        assert not places[0].any()
    assert [verdict_of(word(5, verdict), 5) for verdict in (RAISED, UNWANTED)] == [RAISED, UNWANTED]
    assert verdict_of(UNREAD, 0) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64])
def test_numbers_are_finite_also_where_their_sum_is_not(dtype: torch.dtype) -> None:
    large = torch.full((70_000,), 3e4).to(dtype) * (1e34 if dtype.itemsize >= 4 and dtype != torch.bfloat16 else 1)
    assert is_finite(large)
    for wrong in (torch.inf, -torch.inf, torch.nan):
        large[-1] = wrong
        assert not is_finite(large)
    assert is_finite(torch.tensor([True, False]))
    assert is_finite(torch.arange(5))
    assert is_finite(torch.empty(0))


def test_what_is_dropped_is_not_evaluated_and_said_to_be_unwanted() -> None:
    """Of drafts that are queued those that wait for less than a number; whoever waits for them goes on."""
    memory = SharedMemory.create(1 << 16)
    state = torch.zeros(1, 3)
    arena = Arena.create(1, state, 4, 4, {}, lambda nbytes: memory, 4096)
    order = Order(stamps=arena.end, lines=arena.end + 1024, workers=1, own=0, heard=False)
    evaluated = list[int]()

    def evaluate(work: Work, since: float) -> Times:
        evaluated.append(work.draft.index)
        now = time.perf_counter()
        return Times(now, now, now, now)

    bound = Arena(memory, dataclasses.replace(arena.bind, order=order))
    numbers = memory.tensor(order.lines, (2, LINE // 8), torch.int64)
    leaders, own = Line(numbers[0]), numbers[1]
    ahead = HostAhead(evaluate)
    ahead.bind(1, bound)
    for index, after in ((0, 1), (1, 2), (2, 3), (3, 4)):
        draft = Draft(1, index, 0.0, index, index, sequence=10 + index, after=after)
        ahead.put(Work(draft, bound, [bound.draft(index)], [bound.prediction(index)]))
    leaders.reach(1, time.perf_counter_ns())
    until(lambda: evaluated == [0])
    leaders.drop(4)
    leaders.reach(4, time.perf_counter_ns())
    leaders.wake()
    ahead.settle()
    assert evaluated == [0, 3]
    stamps = memory.tensor(order.stamps, (4, STAMP), torch.int64)[:, 0].tolist()
    assert [verdict_of(said, 10 + index) for index, said in enumerate(stamps)] == [FINE, UNWANTED, UNWANTED, FINE]
    assert own[REACHED] == 4
    ahead.close()
    memory.close()
