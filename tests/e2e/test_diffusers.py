"""Pipelines of diffusers through `parallelize`: the real classes, small random weights, real worker processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest
import torch

from drp.diffusers import Workers
from drp.diffusers.denoisers import DENOISERS
from drp.diffusers.digits import digits_pipeline
from tests.drafting import CHEAP, EVERY, digits_noise, parallelize, reference
from tests.pipelines import PIPELINES, run
from tests.rounds import rounds_of
from tests.tiny.builders import sd3, sdxl
from training.classifier import load_classifier


@pytest.fixture
def workers(pipeline_workers: Workers) -> Workers:
    return pipeline_workers


@pytest.fixture(scope="module")
def one_worker() -> Iterator[Workers]:
    with Workers(1, threads=1) as made:
        yield made


@pytest.fixture(scope="module", params=[3, 4])
def other_workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    with Workers(request.param, threads=1) as made:
        yield made


def attributes(pipe: Any) -> dict[str, Any]:
    """What a user could see of a pipeline: what its components hold, and the weights."""
    seen: dict[str, Any] = {"pipe": dict(vars(pipe))}
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            seen[name] = {path: dict(vars(module)).keys() for path, module in component.named_modules()}
            seen[f"{name}, weights"] = {key: value.clone() for key, value in component.state_dict().items()}
        elif component is not None:
            seen[name] = dict(vars(component))
    return seen


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", EVERY)
def test_one_draft_a_round_is_the_untouched_pipeline(name: str, workers: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    expected = run(pipe, options)
    with parallelize(pipe, workers, drafts=1) as parallel:
        assert torch.equal(run(pipe, options), expected)
    (report,) = parallel.report.calls
    assert report.rounds == report.evaluations == report.steps > 3
    assert not report.sequential
    assert not report.notes


@pytest.mark.diffusers
@pytest.mark.parametrize("name", EVERY)
def test_one_device_is_the_untouched_pipeline(name: str, one_worker: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    expected = run(pipe, options)
    with parallelize(pipe, one_worker) as parallel:
        assert torch.equal(run(pipe, options), expected)
    assert not parallel.report.calls[0].sequential


def conservative(name: str) -> Any:
    """Four of them in the ordinary tests; what is rounds and what is the pipeline are apart."""
    marks = [] if name in ("SDXL", "Flux", "Wan", "ControlNet") else [pytest.mark.diffusers]
    return pytest.param(name, "conservative", marks=marks)


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "aggressive") for name in EVERY), *(conservative(name) for name in EVERY)]
)
def test_workers_have_the_bits_of_one_process(name: str, mode: str, workers: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    with reference(pipe, devices=3, mode=mode):
        expected = run(pipe, options)
    steps: list[int] = []

    def note(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        steps.append(i)
        return {}

    callback: dict[str, Any] = {"callback_on_step_end": note}
    if name in ("PixArt", "DiT"):  # The one has an older kind, the other none.
        callback = {"callback": lambda i, t, latents: steps.append(i)} if name == "PixArt" else {}
    with parallelize(pipe, workers, mode) as parallel:
        assert torch.equal(run(pipe, {**options, **callback}), expected)
    (report,) = parallel.report.calls
    assert report.rounds == rounds_of(mode, report.steps, 3)
    assert report.evaluations == report.steps
    assert not report.sequential
    assert not report.notes
    if callback:
        assert steps == list(range(report.steps))


@pytest.mark.diffusers
@pytest.mark.parametrize("mode", ["aggressive", "conservative"])
@pytest.mark.parametrize("name", EVERY)
def test_other_numbers_of_workers(name: str, mode: str, other_workers: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    n = len(other_workers.devices)
    with reference(pipe, devices=n, mode=mode):
        expected = run(pipe, options)
    with parallelize(pipe, other_workers, mode, drafts=n) as parallel:
        assert torch.equal(run(pipe, options), expected)
    (report,) = parallel.report.calls
    assert report.rounds == rounds_of(mode, report.steps, n)


def test_digits_are_as_asked(workers: Workers) -> None:
    labels = list(range(10))
    pipe = digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with parallelize(pipe, workers):
        images = pipe(labels, 20, latents=digits_noise(10)).images
    assert float((load_classifier()(images).argmax(1) == torch.tensor(labels)).float().mean()) >= 0.9


@contextmanager
def left_as_it_was(pipe: Any, options: dict[str, Any]) -> Iterator[None]:
    """See that a block changes nothing of a pipeline that a user could see; weights may move, those that are shared."""
    run(pipe, options)  # A first call leaves traces of its own.
    before, config, places = attributes(pipe), copy.deepcopy(pipe.config), where_the_rest_lies(pipe)
    yield
    after = attributes(pipe)
    assert before["pipe"].keys() == after["pipe"].keys()
    assert all(before["pipe"][name] is after["pipe"][name] for name in pipe.components)
    assert pipe.config == config
    assert list(before) == list(after)
    for name in before:
        if name != "pipe":
            assert same(before[name], after[name]), name
    assert places == where_the_rest_lies(pipe)


def where_the_rest_lies(pipe: Any) -> list[int]:
    """Return the places in memory of the weights that workers have no use for."""
    modules = {name: each for name, each in pipe.components.items() if isinstance(each, torch.nn.Module)}
    return [p.data_ptr() for name, each in modules.items() if name not in DENOISERS for p in each.parameters()]


def test_the_pipeline_is_left_as_it_was() -> None:
    pipe, processes = sdxl(), psutil.Process().children()
    with left_as_it_was(pipe, CHEAP):
        with parallelize(pipe, 1, threads=1):
            run(pipe, CHEAP)
            assert "forward" in vars(pipe.unet)
            assert len(psutil.Process().children()) == len(processes) + 1
        assert psutil.Process().children() == processes


@pytest.mark.diffusers
@pytest.mark.parametrize("name", ["SD 3", "Flux", "Wan", "ControlNet"])
def test_pipelines_of_other_families_are_left_as_they_were(name: str, one_worker: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    with left_as_it_was(pipe, options), parallelize(pipe, one_worker, drafts=1) as parallel:
        run(pipe, options)  # with the bits of the call before, which schedulers remember
    (report,) = parallel.report.calls
    assert report.rounds == report.steps > 3
    assert not report.sequential


def test_an_error_of_the_pipeline_passes_through(workers: Workers) -> None:
    pipe = sdxl()

    def fail(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if i == 3:
            raise ZeroDivisionError("mine")
        return {}

    expected = run(pipe, CHEAP)
    with parallelize(pipe, workers, drafts=1):
        with pytest.raises(ZeroDivisionError, match="mine"):
            run(pipe, {**CHEAP, "callback_on_step_end": fail})
        assert torch.equal(run(pipe, CHEAP), expected)
    assert "forward" not in vars(pipe.unet)


def test_several_calls_of_different_sizes_and_steps(workers: Workers) -> None:
    pipe = sdxl()
    calls = [(7, CHEAP), (10, {**CHEAP, "height": 32}), (4, {**CHEAP, "guidance_scale": 1.0}), (1, CHEAP)]
    with reference(pipe, devices=3):
        expected = [run(pipe, options, steps) for steps, options in calls]
    with parallelize(pipe, workers) as parallel:
        for (steps, options), samples in zip(calls, expected, strict=True):
            assert torch.equal(run(pipe, options, steps), samples)
    assert [call.rounds for call in parallel.report.calls] == [rounds_of("aggressive", n, 3) for n, _ in calls]
    assert str(parallel.report).count("speed-up") == 3  # The call of one step has no drafts.


@pytest.mark.diffusers
def test_a_lost_worker_is_replaced_and_the_bits_stay() -> None:
    pipe = sdxl()
    with reference(pipe, devices=2):
        expected = run(pipe, CHEAP)
    before = set(psutil.Process().children())

    def kill(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if i == 2:
            min(set(psutil.Process().children()) - before, key=lambda worker: worker.pid).kill()
        return {}

    with parallelize(pipe, 2, threads=1) as parallel:
        assert torch.equal(run(pipe, {**CHEAP, "callback_on_step_end": kill}), expected)
        assert torch.equal(run(pipe, CHEAP), expected)
    assert any("SIGKILL" in note for note in parallel.report.calls[0].notes)


def test_two_pipelines_at_once(workers: Workers) -> None:
    first, second = sdxl(), sd3()
    options = PIPELINES["SD 3"][1]
    with reference(first, devices=3), reference(second, devices=3):
        expected = run(first, CHEAP), run(second, options)
    with parallelize(first, workers), parallelize(second, workers):
        assert torch.equal(run(first, CHEAP), expected[0])
        assert torch.equal(run(second, options), expected[1])
        assert torch.equal(run(first, CHEAP), expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, workers: Workers) -> None:
    pipe = sdxl()
    pipe.to(dtype)
    options = {n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in CHEAP.items()}
    untouched = run(pipe, options)
    with parallelize(pipe, workers, drafts=1):
        assert torch.equal(run(pipe, options), untouched)
    with reference(pipe, devices=3):
        expected = run(pipe, options)
    with parallelize(pipe, workers):
        assert torch.equal(run(pipe, options), expected)


def test_weights_in_another_memory_format_keep_their_bits(workers: Workers) -> None:
    pipe = sdxl()
    pipe.unet.to(memory_format=torch.channels_last)
    untouched = run(pipe, CHEAP)
    with parallelize(pipe, workers, drafts=1):
        assert torch.equal(run(pipe, CHEAP), untouched)


def test_adaptive_goes_from_sequential_to_aggressive(workers: Workers) -> None:
    pipe = sdxl()
    untouched = run(pipe, CHEAP, steps=12)
    with parallelize(pipe, workers, "aggressive"):
        aggressive = run(pipe, CHEAP, steps=12)
    for tolerance, expected in ((0.0, untouched), (1e9, aggressive)):
        with parallelize(pipe, workers, "adaptive", tolerance=tolerance):
            assert torch.equal(run(pipe, CHEAP, steps=12), expected)
    with parallelize(pipe, workers, "adaptive", tolerance=0.01) as parallel:
        drafted = run(pipe, CHEAP, steps=12)
    (report,) = parallel.report.calls
    assert rounds_of("aggressive", 12, 3) < report.rounds < 12
    assert float((drafted - untouched).norm()) < float((aggressive - untouched).norm())


def test_warmup_and_sequential(workers: Workers) -> None:
    pipe = sdxl()
    untouched = run(pipe, CHEAP)
    with parallelize(pipe, workers, "sequential") as parallel:
        assert torch.equal(run(pipe, CHEAP), untouched)
    assert parallel.report.calls[0].rounds == 7
    with parallelize(pipe, workers, warmup=3) as parallel:
        run(pipe, CHEAP)
    assert parallel.report.calls[0].rounds == 3 + rounds_of("aggressive", 4, 3)
