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

from drp import ExecutionOptions
from drp.errors import ProtocolError
from drp.leader.devices import parse_devices
from drp.leader.memory.host_stream import CorePlacement, HostEvent, HostStream, _Signal
from drp.leader.memory.placement import MemoryPlacement
from drp.protocol.arena import Arena
from drp.protocol.memory import SharedMemory
from drp.protocol.messages import AsyncConfig, Draft
from drp.protocol.timeline import (
    CANCELLED,
    COMPLETED,
    COMPLETION_SIZE,
    NOT_FINITE,
    OK,
    PENDING,
    RAISED,
    RING_SIZE,
    TIMELINE_NBYTES,
    TimelineSemaphore,
    WorkerTimelines,
    decode_status,
    encode_status,
    is_finite,
    write_completion,
    write_completion_now,
)
from drp.protocol.wakeup import Wakeup, WakeupReceiver
from drp.workers.async_executor import HostExecutor, HostLeaderEvent, HostWorkerEvent, ThreadStream, WorkItem
from drp.workers.emulated import EvaluationTimes
from tests.waiting import until

DEVICE = ExecutionOptions(dispatch="async")
DEADLINE = 60.0


def test_a_workers_stream_does_in_order_and_says_whether_it_is_done() -> None:
    stream, done, gate = ThreadStream(), list[int](), threading.Event()
    stream.enqueue(lambda: gate.wait(DEADLINE))
    for number in range(5):
        stream.enqueue(lambda number=number: done.append(number))  # type: ignore[misc]  # a default is its own type
    assert stream.busy
    gate.set()
    stream.synchronize()
    assert not stream.busy
    assert done == [0, 1, 2, 3, 4]
    stream.enqueue(lambda: [][0])
    until(lambda: not stream._thread.is_alive())
    with pytest.raises(IndexError):
        stream.enqueue(lambda: None)
    stream.close()


def test_a_lane_goes_as_far_as_it_can_and_says_when_to_go_on() -> None:
    lane, line, done = HostStream(), TimelineSemaphore(zeros()), list[str]()
    lane.enqueue(lambda: done.append("first"))
    lane.enqueue_wait(line, 1, notifies=True)
    lane.enqueue(lambda: done.append("second"))
    mark = lane.record()
    began = time.perf_counter()
    due = lane.run_ready()
    assert done == ["first"]
    assert due is not None
    assert began < due  # somebody rings before; if not, it is looked at again
    assert not lane.query(mark)
    line.signal(1, time.perf_counter_ns() + 10**10)
    assert lane.run_ready() == pytest.approx(began + 10, abs=DEADLINE / 10)
    line.signal(1, time.perf_counter_ns())
    assert lane.run_ready() is None
    assert done == ["first", "second"]
    assert lane.query(mark)
    lane.synchronize()
    lane.enqueue_wait(line, 2, notifies=True)
    with pytest.raises(RuntimeError, match="waits for another process"):
        lane.synchronize()
    lane.enqueue(lambda: [][0])
    line.release()
    line.signal(2, 0)
    with pytest.raises(IndexError):
        lane.run_ready()
    assert lane.run_ready() is None  # What raised is not done again.


def zeros() -> torch.Tensor:
    return torch.zeros(TIMELINE_NBYTES // 8, dtype=torch.int64)


def own(line: torch.Tensor, stream: ThreadStream, bell: Wakeup | None = None) -> HostWorkerEvent:
    """The records of the only worker."""
    return HostWorkerEvent(line[None], AsyncConfig(0, 0, 1, 0, False), stream, bell)


def test_a_record_waits_for_what_was_recorded_when_it_was_asked() -> None:
    """The leader's lane and a worker's thread, on the same lines; the worker rings when it is wanted."""
    leaders, workers, rung = zeros(), zeros(), WakeupReceiver()
    lane, stream, seen = HostStream(), ThreadStream(), list[str]()
    mine, theirs = HostEvent(leaders, lane), HostEvent(workers, lane, notifies=True)
    bell = Wakeup(rung.handle)
    its_leaders, its_own = HostLeaderEvent(leaders, stream), own(workers, stream, bell)
    its_leaders.wait(0)  # Nothing was recorded: it is none.
    stream.synchronize()
    lane.enqueue(lambda: seen.append("written"))
    its_leaders.wait(mine.record())
    gate = threading.Event()
    stream.enqueue(lambda: seen.append("read"))
    stream.enqueue(lambda: gate.wait(DEADLINE))
    its_own.record()
    theirs.wait()
    lane.enqueue(lambda: seen.append("back"))
    time.sleep(0.02)
    assert seen == []
    assert leaders[COMPLETED] == 0
    assert lane.run_ready() is not None
    gate.set()
    assert select.select([rung.fd], [], [], DEADLINE)[0]
    stream.synchronize()
    assert lane.run_ready() is None
    assert seen == ["written", "read", "back"]
    stream.close()
    bell.close()
    rung.close()


def test_what_a_device_does_later_is_waited_for_and_taken_over() -> None:
    """A worker's thread goes on with the device's time, and the leader's waits for it: even if it was seen late."""
    leaders, workers = zeros(), zeros()
    stream, lane = ThreadStream(), HostStream()
    HostLeaderEvent(leaders, stream).wait(0)
    its, theirs = own(workers, stream), HostEvent(workers, lane, notifies=True)
    began = time.perf_counter_ns()
    for turn in range(3):
        stream.enqueue(lambda turn=turn: setattr(stream, "device_time", began + (turn + 1) * 10**8))  # type: ignore[misc]  # a default is its own type
        its.record()
        theirs.wait()
        lane.enqueue(lambda: ends.append(time.perf_counter_ns()))
    ends: list[int] = []
    while (due := lane.run_ready()) is not None:
        time.sleep(max(0.0, min(due - time.perf_counter(), 0.01)))
    assert all(end >= began + (turn + 1) * 10**8 for turn, end in enumerate(ends))
    assert len(ends) == 3
    stream.synchronize()
    assert time.perf_counter_ns() >= began + 3 * 10**8
    stream.close()


def test_more_records_than_there_are_times_for_wait_for_the_oldest() -> None:
    line, stream = zeros(), ThreadStream()
    its, began = own(line, stream), time.perf_counter_ns()
    stream.enqueue(lambda: setattr(stream, "device_time", began + 3 * 10**8))
    for _ in range(RING_SIZE + 1):
        its.record()
    until(lambda: int(line[COMPLETED]) == RING_SIZE)
    assert time.perf_counter_ns() < began + 3 * 10**8
    stream.synchronize()
    assert time.perf_counter_ns() >= began + 3 * 10**8
    assert int(line[COMPLETED]) == RING_SIZE + 1
    stream.close()


def test_a_wait_ends_with_a_release_or_with_its_stream() -> None:
    workers, lane = zeros(), HostStream()
    workers[COMPLETED] = 4
    record = HostEvent(workers, lane, notifies=True)
    record.wait()
    assert lane.run_ready() is not None
    record.release()
    assert lane.run_ready() is None
    assert workers[COMPLETED] == 5  # from where another goes on
    stream, leaders = ThreadStream(), zeros()
    HostLeaderEvent(leaders, stream).wait(9)
    time.sleep(0.05)
    assert stream.busy
    stream.close()
    assert not stream._thread.is_alive()


class Three:
    """Three workers' lines, and a lane that waits for them before it records again."""

    def __init__(self, room: CorePlacement) -> None:
        self.numbers = torch.zeros((3, TIMELINE_NBYTES // 8), dtype=torch.int64)
        self.lines, self.seen = [TimelineSemaphore(line) for line in self.numbers], WorkerTimelines(self.numbers)
        self.lane, self.leaders = HostStream(room), TimelineSemaphore(zeros())
        self.counts, self.reached = [0, 0, 0], [0, 0, 0]

    def wait(self, *workers: int) -> None:
        """Have the lane wait for the next record of each, and then record."""
        for worker in workers:
            self.counts[worker] += 1
            self.lane.enqueue_wait(self.lines[worker], self.counts[worker], notifies=True)
        self.lane.enqueue(_Signal(self.leaders, self.leaders.next_value()))

    def reach(self, worker: int) -> bool:
        """Have a worker come to its next record; return whether it tells."""
        self.reached[worker] += 1
        self.lines[worker].signal(self.reached[worker], time.perf_counter_ns())
        return self.seen.notification(worker, self.reached[worker])


def test_a_leader_with_a_core_of_its_own_is_told_of_each_record_in_turn() -> None:
    three = Three("dedicated")
    for order in ((0, 1, 2), (2, 1, 0), (1, 1, 1)):
        three.wait(*order)
        for worker in order:
            assert three.lane.run_ready() is not None
            assert three.reach(worker), order
        assert three.lane.run_ready() is None


def test_a_leader_that_shares_cores_is_told_once_all_are_done() -> None:
    three = Three("shared")
    for order in ((0, 1, 2), (2, 0, 1), (1, 2)):
        three.wait(*order)
        assert three.lane.run_ready() is not None
        assert [three.reach(worker) for worker in order] == [*[False] * (len(order) - 1), True], order
        assert three.lane.run_ready() is None


def test_where_the_leader_runs_follows_from_the_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    for names, room in (
        (f"{cores}xcpu", "shared"),
        (f"{cores}xemulated:1ms", "shared"),
        (f"{cores - 1 or 1}xcpu", "dedicated" if cores > 1 else "shared"),
    ):
        placement = MemoryPlacement(parse_devices(names, 1), DEVICE, 1)
        assert placement.core_placement == room, names
        placement.close()


def test_a_bell_rings_in_another_process_and_never_blocks() -> None:
    mine = WakeupReceiver()
    code = "import sys; from drp.protocol.wakeup import Wakeup; from drp.protocol.messages import PipeHandle\n"
    code += (
        "wakeup = Wakeup(PipeHandle(int(sys.argv[1]), int(sys.argv[2])))\nfor _ in range(100_000): wakeup.notify()\n"
    )
    ends = [str(number) for number in (mine.handle.pid, mine.handle.fd)]
    subprocess.run([sys.executable, "-c", code, *ends], timeout=DEADLINE, check=True)
    assert select.select([mine.fd], [], [], 0)[0]
    while select.select([mine.fd], [], [], 0)[0]:
        os.read(mine.fd, 4096)
    end = mine.handle
    mine.close()
    with pytest.raises(ProtocolError, match="wake-up pipe"):
        Wakeup(end)


def test_a_completion_record_is_of_one_draft_and_says_whether_its_numbers_are_finite() -> None:
    places = torch.zeros((2, COMPLETION_SIZE), dtype=torch.int64)
    place = places[1]
    assert decode_status(int(place[0]), 1) is None
    for sequence, output in itertools.product((1, 2**48), (torch.ones(3), torch.tensor([1.0, torch.nan]))):
        write_completion(place, sequence, [torch.zeros(2), output], 50, 2**60)
        finite = bool(output.isfinite().all())
        assert decode_status(int(place[0]), sequence) == (OK if finite else NOT_FINITE)
        assert decode_status(int(place[0]), sequence - 1) is None
        assert decode_status(int(place[0]), sequence + 1) is None
        assert place[1:].tolist() == [50, 2**60]
        assert not places[0].any()
    write_completion_now(places.numpy().data, 1, 7, 40, 2**50)
    assert (decode_status(int(place[0]), 7), *place[1:].tolist()) == (OK, 40, 2**50)
    assert [decode_status(encode_status(5, verdict), 5) for verdict in (RAISED, CANCELLED)] == [RAISED, CANCELLED]
    assert decode_status(PENDING, 0) is None


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
    order = AsyncConfig(completions=arena.end, timelines=arena.end + 1024, workers=1, index=0, acknowledge=False)
    evaluated = list[int]()

    def evaluate(work: WorkItem, since: float) -> EvaluationTimes:
        evaluated.append(work.draft.index)
        now = time.perf_counter()
        return EvaluationTimes(now, now, now, now)

    bound = Arena(memory, dataclasses.replace(arena.bind, async_config=order))
    numbers = memory.tensor(order.timelines, (2, TIMELINE_NBYTES // 8), torch.int64)
    leaders, own = TimelineSemaphore(numbers[0]), numbers[1]
    ahead = HostExecutor(evaluate)
    ahead.bind(1, bound)
    for index, after in ((0, 1), (1, 2), (2, 3), (3, 4)):
        draft = Draft(1, index, 0.0, index, index, sequence=10 + index, after=after)
        ahead.submit(WorkItem(draft, bound, [bound.draft(index)], [bound.prediction(index)]))
    leaders.signal(1, time.perf_counter_ns())
    until(lambda: evaluated == [0])
    leaders.cancel_before(4)
    leaders.signal(4, time.perf_counter_ns())
    leaders.wake_waiters()
    ahead.synchronize()
    assert evaluated == [0, 3]
    stamps = memory.tensor(order.completions, (4, COMPLETION_SIZE), torch.int64)[:, 0].tolist()
    assert [decode_status(said, 10 + index) for index, said in enumerate(stamps)] == [OK, CANCELLED, CANCELLED, OK]
    assert own[COMPLETED] == 4
    ahead.close()
    memory.close()
