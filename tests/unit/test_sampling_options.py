"""What callers may ask of a run; that workers compute the same bits is tested in tests/integration/test_leader.py."""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import drp
from drp.client.options import to_submit
from drp.diffusers.pipeline_modes import make_pipeline_mode
from drp.leader.job import Job, make_job
from drp.leader.request import Request, make_request
from drp.protocol.messages import ModelSpec
from drp.sampling import advice
from drp.sampling.drafts import DAMPED, PAPER, SECANT, STEADY, STEADY_WIDE, DraftRule
from drp.sampling.mode_selection import DEFAULT_TOLERANCE, MODE_NAMES, choose_rounds, choose_speedup, make_mode
from drp.sampling.mode_wrappers import PicardSweeps, Warmup
from drp.sampling.modes import Adaptive, Aggressive, Conservative, Sequential, Sparse, Window
from drp.sampling.plan import make_plan, max_advance
from drp.sampling.registry import SOLVER_NAMES, make_solver
from drp.sampling.solvers import DDIM, DPMSolver
from tests.denoisers import make_free
from tests.rounds import rounds_of

SPEC = ModelSpec(sample_shape=(2, 3))
FLOW: dict[str, Any] = {"solver": "euler", "prediction_type": "flow"}


def job(devices: int = 4, **options: Any) -> Job:
    return make_job(Request(count=2, **options), SPEC, devices)


@pytest.mark.parametrize("wrapper", [{}, {"warmup": 2}, {"sweeps": 1}])
@pytest.mark.parametrize("mode", [*MODE_NAMES])
def test_a_mode_is_named_as_it_is_selected(mode: str, wrapper: dict[str, int]) -> None:
    assert job(mode=mode, **wrapper).mode.name == mode


def test_offsets_are_of_the_mode_window() -> None:
    assert job(mode="window", offsets="even").mode.name == "window"


def test_modes_by_option() -> None:
    assert job().mode == Window(4, 3, DAMPED)
    assert job(devices=1).mode == Window(1, 1)
    assert job(solver="ddpm").mode == Window(4, 2.5, STEADY)
    assert job(solver="ddpm", devices=5).mode == Window(5, 3, STEADY_WIDE)
    assert job(solver="ddpm", devices=8).mode == Window(8, 4.5, STEADY_WIDE)
    assert job(solver="ddpm", devices=8, mode="adaptive").mode == Adaptive(8, 0.0025, STEADY)
    assert job(solver="ddpm", devices=2).mode == Window(2, 2, PAPER)
    assert job(solver="ddpm", mode="aggressive").mode == Aggressive(4, PAPER)
    assert job(solver="ddpm", rule="damped").mode == Window(4, 2.5, DAMPED)
    assert job(stride=2.5, drafts=6).mode == Window(6, 2.5)
    assert job(offsets="even").mode == Sparse(4, 4, DAMPED, (2, 4, 6, 8))
    assert job(offsets="tapered", drafts=8).mode == Sparse(8, 8, DAMPED, (1, 2, 3, 4, 6, 8, 10, 12))
    assert job(offsets=[1, 2, 4, 7], stride=5).mode == Sparse(4, 5, DAMPED, (1, 2, 4, 7))
    assert job(mode="aggressive", rule="secant").mode == Aggressive(4, SECANT)
    assert job(mode="aggressive", rule="paper").mode == Aggressive(4, PAPER)
    assert job(rule=DraftRule(0.2, 0.1), mode="conservative", drafts=3).mode == Conservative(3, DraftRule(0.2, 0.1))
    assert job(mode="adaptive", tolerance=0.02).mode == Adaptive(4, 0.02)
    assert job(mode="adaptive", warmup=3, sweeps=2).mode == Warmup(PicardSweeps(Adaptive(4, 0.0025), 2), 3)
    assert job(target_speedup=3.0).mode == Window(4, 47 / 15)
    assert job(target_rounds=14).mode == Window(4, 47 / 13)
    assert job(target_rounds=11, devices=8).mode == Window(8, 4.7)
    assert job(target_rounds=17, devices=8).mode == Window(8, 47 / 16)
    assert job(target_rounds=48).mode == Sequential()
    assert job(target_speedup=1.0).mode == Sequential()
    assert job(solver="ddpm", target_rounds=13).mode == Window(4, 47 / 12, STEADY)
    assert job(solver="ddpm", target_rounds=13, steps=49).mode == Window(4, 4, PAPER)
    assert job(solver="ddpm", target_rounds=13, steps=49, rule="damped").mode == Window(4, 4, DAMPED)


def test_solvers_by_option() -> None:
    solver = job(solver="dpmsolver++", steps=10, solver_options={"order": 3}, grid={"sigmas": "karras"}).solver
    assert isinstance(solver, DPMSolver)
    assert (solver.order, solver.grid.steps) == (3, 10)
    own = DDIM(solver.grid)
    assert job(solver=own).solver is own
    assert isinstance(job(solver="euler", prediction_type="flow", grid={"shift": 3.0}).solver, DDIM)


def test_karras_sigmas_are_even_in_their_rho_th_root() -> None:
    for rho in (3.0, 5.0, 7.0):
        grid = job(solver="unipc", steps=9, grid={"sigmas": "karras", "rho": rho}).solver.grid
        roots = (grid.sigmas[:-1] / grid.alphas[:-1]) ** (1 / rho)
        np.testing.assert_allclose(np.diff(roots), (roots[-1] - roots[0]) / 8)


@pytest.mark.parametrize("speedup", [1.2, 1.9, 2.5, 3.6, 6.8])
def test_the_window_that_reaches_a_speedup(speedup: float) -> None:
    mode, n, stride, _ = choose_speedup(speedup, 48, 8)
    assert stride is not None
    rounds = rounds_of(mode, 48, n, stride)
    assert 48 / rounds >= speedup > 48 / (rounds + 1)
    assert stride <= n <= 8


def test_the_window_that_takes_so_many_rounds() -> None:
    for steps in (2, 3, 10, 28, 48):
        for rounds in range(2, steps):
            for most in range(-(-(steps - 1) // (rounds - 1)), 20):
                for gaps in (False, True):
                    mode, n, stride, offsets = choose_rounds(rounds, steps, most, gaps=gaps)
                    made = make_mode(mode, n, 0.0, PAPER, stride, offsets)
                    assert len(list(made.rounds(steps))) == rounds
                    assert n <= most


def test_a_target_of_the_fewest_rounds_spaces_the_last_quarter_of_the_drafts() -> None:
    stride = 47 / 12
    assert job(target_rounds=13).mode == Sparse(4, stride, DAMPED, (1, 2, 3, 5))
    assert job(target_speedup=3.6).mode == job(target_rounds=13).mode
    assert job(target_rounds=7, devices=8).mode == Sparse(8, 47 / 6, DAMPED, (1, 2, 3, 4, 5, 6, 8, 10))
    assert job(target_rounds=15, warmup=2).mode.for_steps(48) == Warmup(Sparse(4, 45 / 12, DAMPED, (1, 2, 3, 5)), 2)
    # Not with two drafts, not with seven of 28 steps, not where noise is added, and not in pipelines.
    assert job(target_rounds=25, devices=2).mode == Window(2, 47 / 24)
    assert job(target_rounds=5, steps=28, devices=8).mode == Window(7, 27 / 4)
    assert job(target_rounds=13, solver="ddpm").mode == Window(4, stride, STEADY)
    assert make_pipeline_mode("window", 4, None, DEFAULT_TOLERANCE, 0, target_rounds=13).for_steps(48) == Window(
        4, stride
    )


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_target_counts_a_warm_up_and_is_the_same_for_a_model_and_a_pipeline(solver: str, warmup: int) -> None:
    targets: list[dict[str, Any]] = [{"target_rounds": 14}, {"target_speedup": 2.0}]
    for steps, target in itertools.product((24, 33, 48), targets):
        options = {"warmup": warmup, **target}
        mode = job(8, solver=solver, steps=steps, **options).mode
        made = make_pipeline_mode("window", 8, None, DEFAULT_TOLERANCE, adds_noise=solver == "ddpm", **options)
        assert made.for_steps(steps) == mode
        assert len(list(mode.rounds(steps))) == options.get("target_rounds", steps // 2)


def test_more_rounds_evaluate_each_index_as_often_with_all_drafts_that_are_of_use() -> None:
    for steps in (8, 20, 28, 48, 100):
        for most in range(1, 20):
            fewest = 1 + -(-(steps - 1) // most)
            chosen = [choose_rounds(rounds, steps, most) for rounds in range(max(fewest, 2), steps)]
            windows = [(n, s) for _, n, s, _ in chosen if s is not None and s <= steps // 4]
            assert [n / s for n, s in windows if n < 4 * s] == sorted(n / s for n, s in windows if n < 4 * s)
            assert all(n >= min(most, steps // 4, 4 * s) for n, s in windows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "plms"}, "unknown solver 'plms'; choose one of ddim"),
        ({"solver_options": {"order": 2}}, "solver_options holds 'order'; known here: eta"),
        ({"grid": {"spaces": "x"}}, "grid holds 'spaces'; known here: family"),
        ({"grid": {"spacing": "odd"}}, "unknown spacing 'odd'"),
        ({"grid": {"sigmas": "karras"}}, "does not take; choose a solver in sigmas"),
        ({"solver": "euler", "grid": {"sigmas": "odd"}}, "unknown sigmas 'odd'"),
        ({"solver": "euler", "grid": {"sigmas": [3.0, 4.0]}, "steps": 2}, "decreasing numbers"),
        ({"solver": "unipc", "grid": {"rho": 5.0}}, "rho is 5.0; give a number above 0, and sigmas='karras' with it"),
        ({"solver": "unipc", "grid": {"sigmas": "karras", "rho": -1.0}}, "rho is -1.0"),
        ({"grid": {"timesteps": [10, 2000]}, "steps": 2}, "decreasing numbers"),
        ({"grid": {"timesteps": [2000, 10]}, "steps": 2}, "within 0 and 999"),
        ({"grid": {"timesteps": [20.5, 10]}, "steps": 2}, "whole training timesteps"),
        ({"grid": {"schedule": "odd"}}, "unknown schedule 'odd'"),
        ({"grid": {"schedule": [0.1, 0.5]}}, "not a decreasing sequence"),
        ({"grid": {"end": "odd"}}, "end is 'odd'"),
        ({"grid": {"zero_snr": True}}, "prediction_type is 'epsilon' and the first state holds no signal"),
        ({"prediction_type": "odd"}, "unknown prediction type 'odd'"),
        ({"prediction_type": "flow", "solver": "lms"}, "not defined on a flow-matching grid"),
        ({"prediction_type": "v", "solver": "pndm"}, "averages raw outputs"),
        ({"solver": "dpmsolver++", "solver_options": {"order": 4}}, "order is 4; choose 1, 2 or 3"),
        ({"solver": "dpmsolver", "grid": {"end": "zero"}}, "divides by the last sigma"),
        ({"solver_options": {"eta": 2.0}}, "eta is 2.0"),
        ({"strength": 0.5}, "there is no image"),
        ({"strength": 0.0, "image": torch.zeros(2, 2, 3)}, "strength is 0.0"),
        ({"image": torch.zeros(2, 3)}, r"image is \[2, 3\]; give floating point numbers of shape \[2, 2, 3\]"),
        ({"strength": math.nan, "image": torch.zeros(2, 2, 3)}, "strength is nan"),
        ({"strength": math.inf, "image": torch.zeros(2, 2, 3)}, "strength is inf"),
        *(({**FLOW, "grid": {"terminal": value}}, f"terminal is {value}") for value in (0, 1, 1.5, math.nan)),
        ({**FLOW, "steps": 1, "grid": {"terminal": 0.1}}, "terminal is 0.1 with 1 step"),
        *(({**FLOW, "grid": {"mu": value}}, f"mu is {value}") for value in (math.nan, -math.inf, 50.0)),
        *(({**FLOW, "grid": {"mu": value, "shape": "linear"}}, f"mu is {value}") for value in (0, -1, math.nan)),
        *(({**FLOW, "grid": {"training": value}}, f"training is {value}") for value in (0, -1, 0.5)),
        (
            {"solver": "unipc", "grid": {"sigmas": "karras", "rho": 0.001}},
            "rho is 0.001; give a number from 0.1 to 1000",
        ),
        ({"tolerance": -1.0, "mode": "adaptive"}, "tolerance is -1.0"),
        ({"rule": "best"}, "unknown rule 'best'; choose one of paper, secant, damped"),
        ({"mode": Aggressive(2), "rule": "paper"}, "an object that defines its own"),
        ({"target_speedup": 9.0}, "48 steps allow 3.69: use more devices"),
        ({"target_speedup": math.nan}, "target_speedup is nan"),
        ({"target_rounds": 12}, "target_rounds is 12; with at most 4 drafts, 48 steps take 13 rounds or more"),
        ({"target_rounds": 0}, "target_rounds is 0; give a whole number, 1 to"),
        ({"target_rounds": 14, "target_speedup": 2.0}, "both target_speedup and target_rounds"),
        ({"target_rounds": 14, "stride": 2}, "stride is 2, but target_"),
        ({"target_rounds": 14, "mode": "aggressive"}, "target_rounds chooses a window, and mode is 'aggressive'"),
        ({"target_rounds": 14, "warmup": 3}, "45 steps after 3 of warm-up take 15 rounds"),
        ({"target_speedup": 3.4, "warmup": 3}, "48 steps, 3 of them in a warm-up, allow 3.2"),
        ({"stride": 5}, "stride is 5; a window of 4 drafts advances by 1 to 4"),
        ({"stride": math.nan}, "stride is nan; give a number, 1 to 10000"),
        ({"stride": 0}, "stride is 0; give a number, 1 to"),
        ({"tolerance": 0.01}, "tolerance is 0.01, which mode 'window' does not have; choose mode 'adaptive'"),
        ({"tolerance": 0.01, "target_rounds": 4}, "tolerance is 0.01, which mode 'window' does not have"),
        ({"stride": 2, "mode": "aggressive"}, "stride is 2.0, which mode 'aggressive' does not have"),
        ({"offsets": "odd"}, "unknown offsets 'odd'; choose one of dense, even, tapered"),
        ({"offsets": [1, 2, 3]}, "as many rising whole numbers from 1 as drafts, 4"),
        ({"offsets": [0, 1, 2, 3]}, "an offset is 0; give a whole number, 1 to"),
        ({"offsets": "even", "stride": 9}, "drafts up to 8 ahead allow 1 to 8"),
        ({"mode": Aggressive(2), "stride": 1}, "an object that defines its own"),
        ({"warmup": -1}, "warmup is -1"),
        ({"sweeps": 1.5}, "sweeps is 1.5"),
        ({"solver": DDIM(make_solver("ddim", 4).grid), "grid": {"end": "zero"}}, "this solver is an object"),
        ({"solver": None}, "solver is None; give one of ddim, .*, or a drp.sampling.solvers.Solver"),
        ({"mode": 3}, "mode is 3; give one of sequential, .*, or a drp.sampling.modes.Mode"),
        ({"grid": "karras"}, "grid is 'karras'; give a mapping of names to values"),
        ({"solver_options": ["order"]}, r"solver_options is \['order'\]; give a mapping"),
        ({"cond": [torch.zeros(1)]}, "cond is .*; give a mapping"),
        ({"shape": 28}, "shape is 28; give a list of sizes, such as"),
        ({"shape": "1,28,28"}, "shape is '1,28,28'; give a list of sizes"),
        ({"callback": 3}, "callback is 3; give a function of the step and the state"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(**options)


def test_every_solver_drafts() -> None:
    """More signal than noise: the samples lie near those of the sequential run, and are not the same."""
    for name in SOLVER_NAMES:
        kind = "v" if name == "ipndm" else "epsilon"
        options: dict[str, Any] = {"count": 2, "shape": (4, 4), "steps": 24, "solver": name, "prediction_type": kind}
        exact = drp.reference(make_free, mode="sequential", **options).samples
        for mode in ("aggressive", "conservative", "adaptive", "window"):
            drafted = drp.reference(make_free, mode=mode, drafts=3, **options).samples
            assert 0 < (drafted - exact).norm() / exact.norm() < 0.3, (name, mode)
        drafted = drp.reference(make_free, offsets="even", drafts=3, **options).samples
        assert 0 < (drafted - exact).norm() / exact.norm() < 0.5, name


def test_start_from_an_image() -> None:
    image = torch.linspace(-1, 1, 12).view(2, 2, 3)
    given = job(image=image, strength=0.25, steps=20)
    assert given.solver.grid.steps == 5
    grid = given.solver.grid
    noise = job(steps=20).start
    torch.testing.assert_close(given.start, float(grid.alphas[0]) * image + float(grid.sigmas[0]) * noise)
    heun = job(image=image, strength=0.25, steps=20, solver="heun").solver
    assert heun.grid.steps == 2 * 5 - 1
    assert heun.grid.timesteps[0] > heun.grid.timesteps[1] == heun.grid.timesteps[2]


def test_noise_of_a_step_depends_on_seed_and_index_alone() -> None:
    few, many = job(seed=5, solver="ddpm"), make_job(Request(count=3, seed=5, solver="ddpm"), SPEC, 8)
    assert torch.equal(few.fresh(7), many.fresh(7)[:2])
    drawn = [few.fresh(7), few.fresh(8), job(seed=6).fresh(7), few.start]
    for i, a in enumerate(drawn):
        assert all(not torch.equal(a, b) for b in drawn[:i])


BARS = tuple(np.linspace(0.999, 0.001, 10_000))
WHOLE = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 48, 256, 257, 1000, 10_000, 3_000_000, 2**31 - 1, 2**63 - 1, 2**64])
REAL = st.sampled_from([-1e308, -1.0, 0.0, 1e-308, 0.5, 1.0, 2.0, 1e6, 1e300, 1e308, math.inf, math.nan])
NUMBER = WHOLE | REAL | st.just(True)
NUMBERS = {
    "count": NUMBER,
    "shape": st.none() | st.lists(WHOLE, max_size=17),
    "guidance": NUMBER,
    "steps": NUMBER,
    "solver": st.sampled_from(SOLVER_NAMES),
    "solver_options": st.dictionaries(st.sampled_from(["order", "eta", "corrector"]), NUMBER, max_size=2),
    "grid": st.dictionaries(
        st.sampled_from(["offset", "rho", "shift", "mu", "terminal", "training", "timesteps", "sigmas", "zero_snr"]),
        NUMBER | st.lists(REAL, max_size=3) | st.sampled_from(["karras", "leading"]),
        max_size=3,
    ),
    "prediction_type": st.sampled_from(["epsilon", "flow"]),
    "strength": NUMBER,
    "mode": st.sampled_from(["window", "aggressive", "conservative", "adaptive", "rolling"]),
    "drafts": st.none() | NUMBER,
    "target_speedup": st.none() | NUMBER,
    "rule": st.none() | st.builds(DraftRule, st.floats(0, 1), st.floats(0, 1)),
    "stride": st.none() | NUMBER,
    "offsets": st.none() | st.lists(WHOLE, max_size=4) | st.sampled_from(["even", "odd"]),
    "target_rounds": st.none() | NUMBER,
    "tolerance": NUMBER,
    "warmup": NUMBER,
    "sweeps": NUMBER,
    "seed": NUMBER,
}


@pytest.mark.timeout(60)
@settings(max_examples=150)
@given(st.fixed_dictionaries({}, optional=NUMBERS))
def test_no_number_is_used_before_it_is_bounded(options: dict[str, Any]) -> None:
    """Any numbers at all: refused in words, or a run whose first rounds are there at once."""
    try:
        found = make_job(Request(**options), ModelSpec(), 4)
    except ValueError:
        return
    if not found.mode.feedback:
        max_advance(found.mode, found.solver.grid.steps)
    measure = (lambda base, rows: [0.0] * len(rows)) if found.mode.feedback else None
    next(make_plan(found.solver, found.mode, measure))


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_speedup": 1e300, "drafts": 2**31 - 1}, "drafts is 2147483647; give a whole number, 1 to 256"),
        ({"target_speedup": 1e300}, r"target_speedup is 1e\+300; give a number, 1 to 10000"),
        ({"solver": "heun", "steps": 9000, "grid": {"schedule": BARS}}, "of which heun makes 17999; at most 10000"),
        ({"count": 3_000_000}, "count is 3000000; give a whole number, 1 to 16384"),
        ({"sweeps": 2**31 - 1}, "sweeps is 2147483647; give a whole number, 0 to 2082"),
        ({"warmup": 2**31 - 1}, "warmup is 2147483647"),
        ({"guidance": 1e308}, r"guidance is 1e\+308; give a number, -1e\+06 to 1e\+06"),
        ({"shape": (2**31 - 1,) * 3}, "too large; ask for fewer"),
        (
            {"steps": 1000, "drafts": 256, "stride": 2},
            "stride is 2 with 256 drafts and 1000 steps, more than 100000",
        ),
        ({"steps": 9, "solver": "euler", "prediction_type": "flow", "grid": {"mu": 1e308}}, r"mu is 1e\+308"),
        ({"steps": 9, "solver": "euler", "prediction_type": "flow", "grid": {"training": 10**12}}, "within 1e"),
    ],
)
def test_numbers_out_of_bounds_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_job(Request(**{"shape": (4,), **options}), ModelSpec(), 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 6, "drafts": 4}, "6 steps are too few for drafting"),
        ({"steps": 20, "drafts": 8}, "8 drafts per round are many for 20 steps: .* take 6 drafts or fewer"),
        ({"solver": "ddpm", "drafts": 8}, "the solver adds noise, and a round has 8 drafts"),
        ({"steps": 6, "mode": "sequential"}, ""),
        ({"steps": 6, "drafts": 1}, ""),
        ({"drafts": 8}, ""),
    ],
)
def test_a_run_that_may_not_be_worth_it_says_so_once(
    options: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "_said", set[str]())
    for _ in range(2):
        drp.reference(make_free, shape=(2,), **options)
    said = [record.getMessage() for record in caplog.records if record.name == "drp"]
    assert len(said) == bool(words)
    assert all(re.search(words, message) for message in said)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    numbers = {
        "steps": np.int64(12),
        "drafts": np.uint8(3),
        "seed": torch.tensor(7),
        "shape": [np.int64(2), np.int64(3)],
    }
    found = make_job(Request(**numbers, count=np.int32(2), guidance=np.float32(1.5)), SPEC, 4)  # type: ignore[arg-type]
    same = job(steps=12, drafts=3, seed=7, guidance=1.5)
    assert torch.equal(found.start, same.start)
    assert torch.equal(found.cond["guidance"], same.cond["guidance"])
    assert found.mode == same.mode
    assert {type(each) for each in (found.mode.width, found.solver.grid.steps, *found.start.shape)} == {int}
    rounds = job(steps=12, target_rounds=np.int64(5)).mode
    assert rounds == job(steps=12, target_rounds=5).mode


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("step", "unknown option 'step'; did you mean 'steps'?"),
        ("num_inference_steps", "unknown option 'num_inference_steps'; did you mean 'steps'?"),
        ("guidance_scale", "unknown option 'guidance_scale'; did you mean 'guidance'?"),
        ("prompt", "unknown option 'prompt'; choose one of "),
    ],
)
def test_an_unknown_option_is_named_with_the_one_that_was_meant(name: str, words: str) -> None:
    calls: list[Callable[..., Any]] = [
        drp.sample,
        drp.reference,
        lambda **options: make_request(cast("Any", options)),  # as of a leader
        lambda **options: to_submit(1, cast("Any", options), {}),  # as of a client
    ]
    for call in calls:
        with pytest.raises(TypeError, match=re.escape(words)):
            call(**{name: 1})
