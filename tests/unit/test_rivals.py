"""The rivals of bench.rivals: what their papers prove or state of them, and diffusers' own ParaDiGMS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers.pipelines.deprecated.stable_diffusion_variants.pipeline_stable_diffusion_paradigms import (
    StableDiffusionParadigmsPipeline,
)
from torch import Tensor

from bench import sd_digits
from bench.rival_samplers import Problem, chords, paradigms, srds
from bench.rivals import PAPERS_STARTS, main
from drp import models
from drp.sampling.modes import Sequential
from drp.sampling.reference import run_reference
from drp.sampling.registry import make_solver


def curved(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Predict something that depends on the state and the timestep in no simple way."""
    return torch.tanh(1.5 * x + t[:, None] / 500) * (0.5 + t[:, None] / 1000)


def problem(steps: int, devices: int, predicts: str = "epsilon") -> Problem:
    solver = make_solver("euler" if predicts == "flow" else "ddim", steps, predicts)
    start = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Problem(curved, solver, start, {}, devices)


def sequential(given: Problem) -> Tensor:
    return run_reference(given.denoiser, given.solver, Sequential(), given.start, {}).samples


@pytest.mark.parametrize("predicts", ["epsilon", "v", "flow"])
def test_one_core_of_chords_is_the_sequential_run(predicts: str) -> None:
    given = problem(12, 1, predicts)
    assert torch.allclose(chords(given, [0]), sequential(given), rtol=1e-10)
    assert given.rounds == 12


def test_chords_takes_the_rounds_that_its_authors_report() -> None:
    given = problem(50, 8)
    x = chords(given, PAPERS_STARTS)
    assert given.rounds == 7 + 50 - 40
    assert 50 / given.rounds == pytest.approx(2.9, abs=0.05)  # the abstract: 2.9 times as fast with eight cores
    one = given.transition(given.start, curved(given.start, torch.tensor([999.0]), {}), 0, 50)
    exact = sequential(given)
    assert (x - exact).norm() < 0.2 * (one - exact).norm()


def test_corrections_bring_chords_nearer() -> None:
    exact, apart = sequential(problem(50, 8)), []
    for starts in ([0, 40], [0, 16, 40], [0, 8, 16, 24, 32, 40]):
        apart.append(float((chords(problem(50, 8), starts) - exact).norm()))
    assert apart == sorted(apart, reverse=True)


@pytest.mark.parametrize("predicts", ["epsilon", "v", "flow"])
def test_as_many_iterations_as_blocks_of_srds_are_the_sequential_run(predicts: str) -> None:
    given = problem(12, 8, predicts)
    assert torch.allclose(srds(given, 4, 4), sequential(given), rtol=1e-9)


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_srds_takes_the_rounds_of_its_pipeline(iterations: int) -> None:
    given = problem(25, 25)
    srds(given, 5, iterations)
    assert given.rounds == 5 * iterations + 5 - iterations  # S p + B - p with S steps a block and B blocks


def test_iterations_bring_srds_nearer_and_few_devices_take_longer() -> None:
    exact, apart = sequential(problem(25, 25)), []
    for iterations in (1, 2, 3):
        apart.append(float((srds(problem(25, 25), 5, iterations) - exact).norm()))
    assert apart == sorted(apart, reverse=True)
    narrow, wide = problem(25, 2), problem(25, 25)
    assert torch.equal(srds(narrow, 5, 2), srds(wide, 5, 2))
    assert narrow.rounds > wide.rounds
    assert narrow.evaluations == wide.evaluations


def test_paradigms_without_tolerance_is_the_sequential_run() -> None:
    given = problem(12, 4)
    assert torch.allclose(paradigms(given, 0.0), sequential(given), rtol=1e-9)


@pytest.mark.parametrize(("window", "tolerance"), [(4, 0.1), (8, 0.5)])
def test_paradigms_is_that_of_diffusers(window: int, tolerance: float) -> None:
    steps, sizes = 16, []
    pipe: Any = sd_digits.pipeline(StableDiffusionParadigmsPipeline)
    pipe.wrapped_unet = pipe.unet
    asked = sd_digits.arguments(torch.tensor([3]), steps)
    pipe.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0]) // 2))
    with torch.inference_mode():
        theirs = pipe(**asked, parallel=window, tolerance=tolerance, generator=torch.Generator().manual_seed(0)).images
    solver = make_solver("ddim", steps, grid={"spacing": "leading", "offset": 1})
    cond = {"labels": torch.tensor([3]), "guidance": torch.tensor(2.0)}
    ours = Problem(models.load("digits").predict, solver, asked["latents"], cond, window)
    x = paradigms(ours, tolerance)
    assert ours.rounds == len(sizes)
    assert ours.evaluations == sum(sizes)
    assert ours.rounds < steps
    assert (x - theirs).norm() / theirs.norm() < 1e-3


def test_a_round_has_no_more_states_than_devices() -> None:
    given = problem(12, 2)
    with pytest.raises(ValueError, match="3 states in a round of 2 devices"):
        given.predict([(given.start, 0)] * 3)
    with pytest.raises(ValueError, match="give rising indices"):
        chords(given, [0, 12])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ways", "ours,PARADIGMS"], "there is no column 'PARADIGMS'; choose of ours, DRiffusion, CHORDS"),
        (["--ways", "ours", "--write"], "--write needs all columns"),
    ],
)
def test_columns_that_there_are_not(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 2
    assert message in done.output
