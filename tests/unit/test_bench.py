import json
from pathlib import Path
from typing import Any

import pytest

from bench.drafting import interval
from bench.equal_error import sequential_rounds
from bench.figures import machine
from bench.rounds import split, summary
from drp.leader.events import TraceEvent

MS = 1_000_000

TIMELINE = [
    TraceEvent("begin", 0, 7),
    TraceEvent("scheduled", 1 * MS, 7),
    TraceEvent("sent", 2 * MS, 7, 0, 0),
    TraceEvent("refined", 3 * MS, 7),
    TraceEvent("predicted", 23 * MS, 7, 0, 0, 0.020),
    TraceEvent("scheduled", 25 * MS, 7),
    TraceEvent("sent", 26 * MS, 7, 1, 0),
    TraceEvent("sent", 27 * MS, 7, 2, 1),
    TraceEvent("sent", 28 * MS, 7, 3, 0),
    TraceEvent("refined", 30 * MS, 7),
    TraceEvent("predicted", 46 * MS, 7, 1, 0, 0.019),
    TraceEvent("predicted", 60 * MS, 7, 2, 1, 0.031),
    TraceEvent("predicted", 68 * MS, 7, 3, 0, 0.021),
    TraceEvent("end", 70 * MS, 7),
]


def test_a_timeline_is_divided_into_rounds_and_their_parts() -> None:
    run = split(TIMELINE)
    first, second = run.rounds
    assert (first.drafts, second.drafts) == (1, 3)
    assert run.wall == pytest.approx(0.070)
    assert (first.wall, first.slowest, first.lost) == pytest.approx((0.023, 0.020, 0.003))
    assert (first.arithmetic, first.sending, first.wire) == pytest.approx((0.001, 0.001, 0.001))
    assert second.slowest == pytest.approx(0.040)  # worker 0 had two drafts, 19 and 21 ms
    assert second.waiting == pytest.approx(0.040 - (0.040 + 0.031) / 2)
    assert (second.arithmetic, second.sending, second.wire) == pytest.approx((0.002, 0.001, 0.002))
    for r in run.rounds:
        assert r.lost == pytest.approx(r.arithmetic + r.sending + r.wire)
    assert run.efficiency == pytest.approx(0.060 / 0.070)


def ahead(began: float, ended: float) -> dict[str, Any]:
    return {"seconds": ended - began, "times": (began, began, ended, ended)}


AHEAD = [
    TraceEvent("begin", 0, 7),
    TraceEvent("scheduled", 1 * MS, 7, steps=(0,)),
    TraceEvent("sent", 2 * MS, 7, 0, 0),
    TraceEvent("scheduled", 3 * MS, 7, steps=(1, 2)),
    TraceEvent("sent", 4 * MS, 7, 1, 0),
    TraceEvent("sent", 5 * MS, 7, 2, 1),
    TraceEvent("predicted", 29 * MS, 7, 0, 0, **ahead(0.003, 0.023)),
    TraceEvent("predicted", 52 * MS, 7, 2, 1, **ahead(0.025, 0.049)),
    TraceEvent("predicted", 53 * MS, 7, 1, 0, **ahead(0.024, 0.044)),
    TraceEvent("end", 54 * MS, 7),
]


def test_rounds_ahead_of_the_devices_are_divided_by_the_devices_clocks() -> None:
    run = split(AHEAD)
    first, second = run.rounds
    assert (first.drafts, second.drafts) == (1, 2)
    assert (first.wall, first.slowest, first.lost) == pytest.approx((0.023, 0.020, 0.003))
    assert (second.wall, second.slowest, second.mean) == pytest.approx((0.026, 0.024, 0.022))
    assert (second.arithmetic, second.sending, second.wire) == pytest.approx((0.001, 0.0, 0.001))
    assert run.wall == pytest.approx(0.054)
    assert run.efficiency == pytest.approx(0.044 / 0.054)


def test_a_summary_takes_only_rounds_of_so_many_drafts() -> None:
    figures = summary([split(TIMELINE)], drafts=3)
    assert figures["lost_p50"] == pytest.approx(0.005)
    assert figures["efficiency_p95"] == pytest.approx(6 / 7)


def test_results_in_the_repository_say_emulated_and_name_their_machine() -> None:
    found = list(Path(__file__).parents[2].joinpath("bench", "results").glob("emulated-*.json"))
    assert found
    for path in found:
        results = json.loads(path.read_text())
        assert machine().keys() <= results["machine"].keys()
        assert all(device.startswith("emulated:") for device in results["speedup"])


def test_the_interval_of_a_ratio_holds_the_ratio_and_widens_with_scatter() -> None:
    ours, papers = [1.0, 2.0, 3.0, 4.0] * 8, [2.0, 4.0, 6.0, 8.0] * 8
    assert interval(ours, papers) == pytest.approx((0.5, 0.5))
    low, high = interval([*ours, 60.0], [*papers, 10.0])  # one sample rules the mean of the first
    assert low < 0.6 < 1.0 < high


def test_an_error_between_two_numbers_of_steps_has_rounds_between_them() -> None:
    best = [(5, 0.16), (10, 0.04), (20, 0.01)]
    assert sequential_rounds(0.02, best) == pytest.approx(200**0.5)
    assert [sequential_rounds(error, best) for error in (0.2, 0.001)] == [5.0, 20.0]
