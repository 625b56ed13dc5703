"""The figures of the quality report, where they are known."""

import pytest
import torch

from bench.quality import FEWER, SPREADS, distances, frechet, summary, ways, ways_on_spreads
from drp.sampling.modes import Aggressive
from tests.rounds import rounds_of


def test_frechet_distance_of_gaussians() -> None:
    g = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25)
    # Covariances c and 4 c: the trace of c + 4 c - 2 sqrt(4 c c) is that of c.
    assert frechet(2 * (a - a.mean(0)), a - a.mean(0)) == pytest.approx(float(torch.cov(a.T).trace()))


def test_distances_are_relative_to_each_sample() -> None:
    b = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    assert distances(b * 1.1, b).tolist() == pytest.approx([0.1, 0.1])
    assert summary(torch.tensor([1.0, 2.0, 9.0])) == {"mean": 4.0, "median": 2.0, "max": 9.0}


def test_every_way_is_measured_against_as_many_sequential_steps() -> None:
    listed = ways(120)
    assert [(way.name, way.steps) for way in listed[:2]] == [("sequential", 48), ("solution", 120)]
    fewer = {way.steps for way in listed if way.name == "fewer steps"}
    drafted = [way for way in listed if way.name.startswith(("aggressive", "window"))]
    assert {len(list(way.mode.rounds(48))) for way in drafted} == fewer == {*FEWER}
    assert len({way.label for way in listed}) == len(listed)


def test_on_every_spread_drafts_meet_as_many_sequential_steps_as_they_take_rounds() -> None:
    listed = ways_on_spreads(1000)
    assert len({way.label for way in listed}) == len(listed)
    for grid in SPREADS.values():
        here = [way for way in listed if way.grid == grid and way.name != "solution"]
        drafted = {rounds_of("aggressive", way.steps, way.mode.n) for way in here if isinstance(way.mode, Aggressive)}
        assert drafted == {way.steps for way in here if way.name.startswith("fewer steps")} == {25, 13, 7}
