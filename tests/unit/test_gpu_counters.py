"""What workers on GPUs record: numbers in the leader's memory. Who writes which, and that the lost are not waited for.

Streams that write and wait are the GPU's to show (tests/gpu); here each call is noted instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from drp import ExecutionOptions
from drp.errors import CudaError, ProtocolError
from drp.leader.devices import parse_devices
from drp.leader.memory import placement
from drp.leader.memory.placement import MemoryPlacement
from drp.protocol.cuda import MAX_COUNTERS, GpuCounters, WorkerCounter, WorkerCounterView
from drp.protocol.timeline import CANCEL_ALL
from drp.workers.cuda_executor import Evaluations, last_seconds
from tests.on_host import GPUS, HostGpuMemory


class Noted:
    """Numbers whose calls are noted."""

    count = MAX_COUNTERS

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.freed = False

    def write(self, line: int, number: int) -> None:
        self.calls.append(("write", line, number))

    def wait(self, line: int, number: int) -> None:
        self.calls.append(("wait", line, number))

    def set(self, line: int, number: int) -> None:
        self.calls.append(("set", line, number))

    def free(self) -> None:
        self.freed = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Noted]:
    """All that a leader makes."""
    made: list[Noted] = []

    def create() -> Noted:
        made.append(Noted())
        return made[-1]

    monkeypatch.setattr("drp.leader.memory.placement.GpuCounters.create", create)
    monkeypatch.setattr(placement, "GpuMemory", HostGpuMemory)
    return made


@pytest.fixture
def placements(made: list[Noted]) -> Iterator[MemoryPlacement]:
    of_two = MemoryPlacement(devices(), ExecutionOptions(dispatch="async"), 1)
    yield of_two
    of_two.close()
    assert all(numbers.freed for numbers in made)


def devices() -> Any:
    return parse_devices("2xcuda:0", 1, lambda: GPUS)


def record_of(placements: MemoryPlacement, worker: int) -> WorkerCounterView:
    record = placements.worker_event(worker, Any, 0, Any)  # type: ignore[arg-type]  # what is asked of memory and stream on the host
    assert isinstance(record, WorkerCounterView)
    return record


def test_a_worker_counts_its_drafts_and_the_leader_its_answers() -> None:
    numbers: Any = Noted()
    own, leaders = WorkerCounter(numbers, 5), WorkerCounterView(numbers, 5)
    assert [own.record() for _ in range(3)] == [1, 2, 3]
    for _ in range(3):
        leaders.wait()
    assert numbers.calls == [(what, 5, count) for what in ("write", "wait") for count in (1, 2, 3)]
    leaders.release()
    assert numbers.calls[-1] == ("set", 5, CANCEL_ALL)
    with pytest.raises(ProtocolError, match=f"counter {MAX_COUNTERS} is out of range; there are {MAX_COUNTERS}"):
        WorkerCounter(numbers, MAX_COUNTERS)


def test_who_takes_a_lost_workers_place_has_another_line(placements: MemoryPlacement, made: list[Noted]) -> None:
    """There may yet be waits for the last one's, which must not begin anew."""
    first, second = devices()
    for number, device in enumerate((first, second)):
        assert placements.worker_config(number, device) is not None
    before = record_of(placements, 0)
    before.release()
    made[0].calls.clear()
    placements.worker_config(0, first)
    after = record_of(placements, 0)
    assert len({before.index, after.index, record_of(placements, 1).index}) == 3
    assert made[0].calls == [("set", before.index, CANCEL_ALL)]  # for one that has written since


def test_there_are_lines_for_as_many_workers_as_are_ever_started(
    placements: MemoryPlacement, made: list[Noted]
) -> None:
    places = set()
    for _ in range(MAX_COUNTERS + 2):
        placements.worker_config(0, devices()[0])
        record = record_of(placements, 0)
        places.add((id(record.counters), record.index))
    assert len(places) == MAX_COUNTERS + 2
    assert len(made) == 2


def test_nothing_is_waited_for_when_all_is_freed(made: list[Noted]) -> None:
    placements = MemoryPlacement(devices(), ExecutionOptions(dispatch="async"), 1)
    for number in (0, 1, 0):
        placements.worker_config(number, devices()[number])
    made[0].calls.clear()
    placements.close()
    assert sorted(made[0].calls) == [("set", line, CANCEL_ALL) for line in range(3)]
    assert made[0].freed


def test_a_driver_that_cannot_write_counters_makes_auto_synchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    def create() -> GpuCounters:
        raise CudaError("cuStreamWriteValue64_v2 is not in this driver")

    monkeypatch.setattr(GpuCounters, "create", create)
    automatic, explicit = (MemoryPlacement(devices(), ExecutionOptions(dispatch=d), 1) for d in ("auto", "async"))
    automatic._init_counters()
    assert not automatic.allows_async
    with pytest.raises(CudaError, match="not in this driver"):
        explicit._init_counters()
    for each in (automatic, explicit):
        each.close()


class Recorded:
    """An event of a GPU, at a time in ms; None while it is not complete."""

    def __init__(self, ms: float | None) -> None:
        self.ms = ms

    def query(self) -> bool:
        return self.ms is not None

    def elapsed_time(self, end: Recorded) -> float:
        assert self.ms is not None
        assert end.ms is not None
        return end.ms - self.ms


def test_the_time_of_the_last_complete_evaluation_is_taken_and_no_other_is_waited_for() -> None:
    evaluations: Evaluations = deque()
    assert last_seconds(evaluations) == 0.0
    third = Recorded(None)
    evaluations += [(Recorded(0.0), Recorded(20.0)), (Recorded(25.0), Recorded(75.0)), (Recorded(80.0), third)]
    assert last_seconds(evaluations) == pytest.approx(0.05)
    assert last_seconds(evaluations) == 0.0
    assert len(evaluations) == 1
    third.ms = 90.0
    assert last_seconds(evaluations) == pytest.approx(0.01)
    assert not evaluations
