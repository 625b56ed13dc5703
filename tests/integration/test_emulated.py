import os
import statistics
import types
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import drp
from drp.leader.devices import parse_devices, parse_emulated
from drp.limits import MAX_WORKERS
from drp.protocol import waiting
from drp.protocol.codec import decode, encode
from drp.protocol.messages import TO_WORKER, Draft, Emulated, Load
from drp.workers import emulated
from drp.workers.emulated import EmulatedDevice
from drp.workers.prediction_cache import PredictionCache

CHEAP = "drp.workers.emulated:load"
EVERYTHING = "emulated:20ms:jitter=10%:straggler=3x@5%:link=50us@10GB/s:values=cheap"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("emulated:20ms", Emulated(0, 0.02)),
        ("emulated:500us", Emulated(0, 0.0005)),
        ("emulated:1.5s", Emulated(0, 1.5)),
        ("emulated:5ms:link=1ms", Emulated(0, 0.005, latency=0.001)),
        ("emulated:5ms:values=model", Emulated(0, 0.005)),
        ("emulated:5ms:values=recorded", Emulated(0, 0.005, values="recorded")),
        (EVERYTHING, Emulated(0, 0.02, 0.1, 3.0, 0.05, 5e-5, 1e10, "cheap")),
    ],
)
def test_an_emulated_device_is_what_its_name_says(name: str, expected: Emulated) -> None:
    said = parse_emulated(name, 0)
    assert (said.number, said.values) == (expected.number, expected.values)
    for field in ("seconds", "jitter", "straggler_factor", "straggler_share", "latency", "bandwidth"):
        assert getattr(said, field) == pytest.approx(getattr(expected, field)), field


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("emulated", "'' is not a time"),
        ("emulated:", "'' is not a time"),
        ("emulated:20", "'20' is not a time"),
        ("emulated:-1ms", "'-1ms' is not a time"),
        ("emulated:2h", "'2h' is not a time"),
        ("emulated:9999999s", "not a time up to 3600 s"),
        ("emulated:20ms:", "'' is not an option"),
        ("emulated:20ms:jitter", "'jitter' is not an option"),
        ("emulated:20ms:jitter=10", "'jitter=10' is not an option"),
        ("emulated:20ms:jitter=300%", "at most 100%"),
        ("emulated:20ms:straggler=3x@101%", "at most 100%"),
        ("emulated:20ms:jitter=10%:jitter=20%", "jitter is given twice"),
        ("emulated:20ms:link=@1GB/s", "'' is not a time"),
        ("emulated:20ms:link=1ms@0GB/s", "'0GB/s' is not a rate above 0"),
        ("emulated:20ms:link=1ms@", "'' is not a rate above 0"),
        ("emulated:20ms:values=good", "'values=good' is not an option"),
        ("emulated:20ms,jitter=10%", "'jitter=10%' does not exist"),
        ("emulator:20ms", "'emulator:20ms' does not exist"),
        ("0xemulated:20ms", "0 devices"),
        ("2x3xemulated:20ms", "'3xemulated:20ms' does not exist"),
        (f"{MAX_WORKERS}xemulated:20ms,cpu", f"a run needs 1 to {MAX_WORKERS}"),
    ],
)
def test_a_name_that_is_none_is_refused_with_a_remedy(name: str, complaint: str) -> None:
    with pytest.raises(ValueError, match="device") as refusal:
        parse_devices(name, 1)
    assert complaint in str(refusal.value)


def test_several_of_a_name_are_counted_and_numbered() -> None:
    devices = parse_devices("2xemulated:20ms,emulated:40ms", 1)
    assert [d.name for d in devices] == ["emulated:20ms", "emulated:20ms", "emulated:40ms"]
    assert [d.emulated.number for d in devices if d.emulated] == [0, 1, 2]
    assert devices == parse_devices(["emulated:20ms"] * 2 + ["emulated:40ms"], 1)
    assert [d.emulated for d in parse_devices("2xcpu", 1)] == [None, None]


def test_the_worker_is_told_what_it_emulates() -> None:
    load = Load("digits", parse_emulated(EVERYTHING, 3))
    assert decode(encode(load), TO_WORKER) == load


class Clock:
    """A clock whose sleeps are too short at first, as a sleep may be that a signal ends."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds / 2 if seconds > 1e-4 else seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (emulated, waiting):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=clock.perf_counter, sleep=clock.sleep))
    return clock


def test_an_evaluation_takes_the_stated_time_and_the_link_is_apart(clock: Clock) -> None:
    device = EmulatedDevice(Emulated(0, 0.02, latency=0.001, bandwidth=1e6))
    evaluated_at = []

    def evaluate() -> None:
        evaluated_at.append(clock.now)
        clock.now += 0.015

    began, _, ended, there = device.run(Draft(0, 0, 999.0, 0, 0), 4000, evaluate)
    assert evaluated_at == [pytest.approx(100.005)]
    assert began == pytest.approx(100.005)
    assert ended == pytest.approx(100.025)
    assert clock.now == there == pytest.approx(100.03)


@pytest.mark.parametrize(("takes", "ends"), [(0.001, 99.925), (0.015, 99.925), (0.5, 100.5)])
def test_one_that_is_queued_takes_its_time_from_when_it_might_begin(clock: Clock, takes: float, ends: float) -> None:
    """It began 0.1 s ago, and is over by now or in time, unless this process is too slow for it."""

    def evaluate() -> None:
        clock.now += takes

    device = EmulatedDevice(Emulated(0, 0.02, latency=0.005))
    began, _, ended, there = device.run(Draft(0, 0, 999.0, 0, 0), 4000, evaluate, since=99.9)
    assert began == pytest.approx(99.905)
    assert ended == pytest.approx(max(ends, 100.0 + takes))
    assert there == pytest.approx(ended + 0.005)
    assert clock.now == pytest.approx(100.0 + takes)  # It does not sleep: whoever waits for the prediction does.


def test_one_that_is_queued_is_over_when_its_time_is(clock: Clock) -> None:
    times = EmulatedDevice(Emulated(0, 0.02)).run(Draft(0, 0, 999.0, 0, 0), 4000, lambda: None, since=99.99)
    assert times.ended == pytest.approx(100.01)
    assert clock.now == 100.0


def test_an_evaluation_that_takes_longer_is_reported_as_it_was(clock: Clock) -> None:
    def evaluate() -> None:
        clock.now += 0.5

    began, _, ended, _ = EmulatedDevice(Emulated(0, 0.02)).run(Draft(0, 0, 999.0, 0, 0), 4000, evaluate)
    assert ended - began == pytest.approx(0.5)


@given(number=st.integers(0, 255), run=st.integers(0, 10**6), index=st.integers(0, 999))
def test_times_repeat_for_a_device_a_run_and_an_index(number: int, run: int, index: int) -> None:
    first, again = (EmulatedDevice(Emulated(number, 1.0, 0.2, 3.0, 0.5)) for _ in range(2))
    assert first.seconds(run, index) == again.seconds(run, index) >= 0


def test_times_are_distributed_as_stated() -> None:
    steady = EmulatedDevice(Emulated(0, 0.02, jitter=0.1))
    times = [steady.seconds(0, k) for k in range(4000)]
    assert statistics.mean(times) == pytest.approx(0.02, rel=0.01)
    assert statistics.stdev(times) == pytest.approx(0.002, rel=0.05)
    straggling = EmulatedDevice(Emulated(0, 0.02, straggler_factor=3.0, straggler_share=0.05))
    late = [t for t in (straggling.seconds(0, k) for k in range(4000)) if t != 0.02]
    assert late == [pytest.approx(0.06)] * len(late)
    assert len(late) / 4000 == pytest.approx(0.05, abs=0.01)
    other = EmulatedDevice(Emulated(1, 0.02, jitter=0.1))
    assert times[:10] != [other.seconds(0, k) for k in range(10)] != [other.seconds(1, k) for k in range(10)]


def test_cheap_values_are_those_of_the_cheap_model() -> None:
    with drp.Leader(Halves, devices="emulated:1ms:values=cheap") as leader:
        cheap = leader.sample(shape=(3,), steps=4).samples
    assert torch.equal(cheap, drp.reference(CHEAP, shape=(3,), steps=4).samples)
    assert not torch.equal(cheap, drp.reference(Halves, shape=(3,), steps=4).samples)


def test_recorded_values_are_the_models_and_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRP_TEST_EVALUATIONS", str(tmp_path / "evaluations"))
    runs = [{"shape": (3, 4), "steps": 6, "seed": seed, "mode": "conservative", "drafts": 2} for seed in (1, 2)]
    expected = [drp.reference(Halves, **run).samples for run in runs]  # type: ignore[arg-type]  # options
    with drp.Leader(Counts, devices="emulated:5ms:values=recorded") as leader:
        first = [leader.sample(**run) for run in runs]  # type: ignore[arg-type]  # likewise
        evaluated = (tmp_path / "evaluations").stat().st_size
        again = [leader.sample(**run) for run in runs]  # type: ignore[arg-type]  # likewise
    for results in (first, again):
        assert [torch.equal(r.samples, e) for r, e in zip(results, expected, strict=True)] == [True, True]
    assert evaluated == sum(r.evaluations for r in first)
    assert (tmp_path / "evaluations").stat().st_size == evaluated


def test_a_recording_knows_everything_that_it_was_asked_and_keeps_so_much() -> None:
    seen = []

    def predict(x: torch.Tensor, t: torch.Tensor, cond: Mapping[str, torch.Tensor]) -> torch.Tensor:
        seen.append(1)
        return x + t.view(-1, 1) + cond["c"]

    recorded = PredictionCache(predict, max_nbytes=3 * 16)
    x, t, cond = torch.zeros(1, 4), torch.ones(1), {"c": torch.ones(1, dtype=torch.bfloat16)}
    for asked in ((x, t, cond), (x + 1, t, cond), (x, t + 1, cond), (x, t, {"c": cond["c"] + 1})):
        assert torch.equal(recorded(*asked), predict(*asked))
        assert torch.equal(recorded(*asked), predict(*asked))
    assert len(seen) == 4 * 3
    recorded(x, t, cond)  # of four there is room for three, and this was the first
    assert len(seen) == 4 * 3 + 1


class Counts:
    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        with Path(os.environ["DRP_TEST_EVALUATIONS"]).open("a") as file:
            file.write("x")
        return x / 2


class Halves:
    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: object) -> torch.Tensor:
        return x / 2
