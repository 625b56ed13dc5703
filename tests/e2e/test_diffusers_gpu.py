"""Pipelines on GPUs, whose place the host takes: leader, workers, sockets and handles are the real ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from drp import ExecutionOptions
from drp.diffusers import Workers, parallelize, reference
from tests import on_host, on_host_pipelines
from tests.pipelines import IMAGE, PIPELINES, check_bits, drafted, run
from tests.tiny.builders import normal, pooled, prompts, sdxl

SDXL = {**prompts(1, 6, 8), **pooled(), **IMAGE}


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        on_host_pipelines.use(patch, tmp_path_factory.mktemp("gpus"))
        yield


@pytest.fixture(scope="module")
def workers(gpus: None) -> Iterator[Workers]:
    with Workers("2xcuda:0,cuda:1", threads=1) as made:
        yield made


def pids(workers: Workers) -> list[int]:
    return [worker.pid or 0 for worker in workers.status]


def inodes(pid: int) -> set[int]:
    """The files that a process has mapped."""
    return {int(line.split()[4]) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}


@pytest.mark.parametrize("name", ["SDXL", "DiT", "Flux"])
def test_workers_on_gpus_have_the_bits_of_one_process(name: str, workers: Workers) -> None:
    make, options = PIPELINES[name]
    check_bits(make(), options, workers, "3xcuda")


def test_each_gpu_has_the_weights_once_and_that_of_the_pipeline_its_own(workers: Workers) -> None:
    pipe = sdxl()
    weight = pipe.unet.conv_in.weight
    with parallelize(pipe, workers, "aggressive"):
        run(pipe, SDXL)
        home = on_host.inode(weight.data_ptr())
        first, second, other = (inodes(pid) for pid in pids(workers))
    assert home
    assert home in first & second
    assert home not in other
    assert on_host.inode(weight.data_ptr()) == home  # after the `with`, too


def test_weights_are_moved_once_for_parallelizations_that_follow_one_another(workers: Workers) -> None:
    """What was moved stays until the workers are closed: to move it anew each time would fill the GPUs."""
    pipe = sdxl()
    sizes = []
    for _ in range(3):
        with parallelize(pipe, workers, "aggressive") as parallel:
            run(pipe, SDXL)
        drafted(parallel.report.calls[0])
        sizes.append(sum(len(weights.exported) for weights in workers._weights.values()))
    assert sizes == sizes[:1] * 3
    pipe.unet.conv_in.weight.data.mul_(1.1)  # between two of them
    with reference(pipe, devices="3xcuda", mode="aggressive"):
        changed = run(pipe, SDXL)
    with parallelize(pipe, workers, "aggressive"):
        assert torch.equal(run(pipe, SDXL), changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_another_memory_format(dtype: torch.dtype, workers: Workers) -> None:
    pipe = sdxl()
    pipe.to(dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    options = {n: v.to(dtype) if isinstance(v, torch.Tensor) else v for n, v in SDXL.items()}
    check_bits(pipe, options, workers, "3xcuda")


def test_calls_inside_inference_mode_and_outside(workers: Workers) -> None:
    pipe = sdxl()
    untouched = run(pipe, SDXL)
    with parallelize(pipe, workers, drafts=1) as parallel:
        with torch.inference_mode():
            inside = run(pipe, SDXL)
        assert torch.equal(run(pipe, SDXL), untouched)
    assert torch.equal(inside, untouched)
    assert not any(call.sequential for call in parallel.report.calls)


def test_weights_that_change_in_place_are_followed_on_all_gpus(workers: Workers) -> None:
    pipe = sdxl()
    with reference(pipe, devices="3xcuda", mode="aggressive"):
        before = run(pipe, SDXL)
    with parallelize(pipe, workers, "aggressive"):
        assert torch.equal(run(pipe, SDXL), before)
        pipe.unet.conv_in.weight.data.mul_(1.1)  # as a LoRA is fused
        changed = run(pipe, SDXL)
    with reference(pipe, devices="3xcuda", mode="aggressive"):
        assert torch.equal(run(pipe, SDXL), changed)
    assert not torch.equal(before, changed)


def test_weights_that_a_callback_changes_in_place_are_followed_on_all_gpus(workers: Workers) -> None:
    pipe = sdxl()

    @torch.no_grad()
    def change(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if i in (2, 3):
            pipe.unet.conv_in.weight.mul_(2.0 if i == 2 else 0.5)
        return {}

    options = {**SDXL, "callback_on_step_end": change}
    with reference(pipe, devices="3xcuda", mode="aggressive"):
        expected = run(pipe, options, 9)
    with parallelize(pipe, workers, "aggressive") as parallel:
        assert torch.equal(run(pipe, options, 9), expected)
    assert parallel.report.calls[0].notes["a step was evaluated without drafts: unet itself was changed"] == 2


def test_a_lost_worker_s_drafts_are_evaluated_on_another_gpu(workers: Workers) -> None:
    pipe = sdxl()
    with reference(pipe, devices="3xcuda", mode="aggressive"):
        expected = run(pipe, SDXL)

    def kill(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if i == 2:
            os.kill(pids(workers)[2], signal.SIGKILL)
        return {}

    with parallelize(pipe, workers, "aggressive") as parallel:
        assert torch.equal(run(pipe, {**SDXL, "callback_on_step_end": kill}), expected)
    (report,) = parallel.report.calls
    drafted(report)
    assert any("worker 2 (cuda:1, process" in note and "SIGKILL" in note for note in report.notes)


def test_workers_that_cannot_share_a_gpu_s_memory_have_weights_from_the_host(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = sdxl()
    with reference(pipe, devices="3xcuda", mode="aggressive"):
        expected = run(pipe, SDXL)
    monkeypatch.setattr(workers._leader.internals.placement, "shares_gpu_memory", False)
    with parallelize(pipe, workers, "aggressive") as parallel:
        assert torch.equal(run(pipe, SDXL), expected)
        pipe.unet.conv_in.weight.data.mul_(1.1)
        changed = run(pipe, SDXL)
    drafted(parallel.report.calls[1])
    with reference(pipe, devices="3xcuda", mode="aggressive"):
        assert torch.equal(run(pipe, SDXL), changed)


def captures() -> int:
    """How many graphs workers have captured so far."""
    found = Path(os.environ["DRP_TEST_STEPS"])
    return found.read_text().count('"captured"') if found.exists() else 0


def test_a_step_s_calls_are_captured_once(gpus: None) -> None:
    """As graphs they have the same bits, also after a weight was changed in place, and with other conditions."""
    pipe, batch = sdxl(), 2  # The first draft is evaluated alone.
    count: dict[str, Any] = {"drafts": 4, "mode": "aggressive"}
    other = {**SDXL, "prompt_embeds": normal(1, 6, 8, seed=5)}
    with Workers("cuda:0", threads=1, execution=ExecutionOptions(graphs=True), drafts_per_device=batch) as workers:
        expected = []
        for options in (SDXL, other):
            with reference(pipe, devices="cuda:0", drafts_per_device=batch, **count):
                expected.append(run(pipe, options))
        before = captures()
        with parallelize(pipe, workers, **count) as parallel:
            assert torch.equal(run(pipe, SDXL), expected[0])
            made = captures() - before
            assert torch.equal(run(pipe, other), expected[1])
            pipe.unet.conv_in.weight.data.mul_(1.1)
            changed = run(pipe, SDXL)
            assert captures() - before == made >= 1
        for call in parallel.report.calls:
            drafted(call)
    with reference(pipe, devices="cuda:0", drafts_per_device=batch, **count):
        assert torch.equal(run(pipe, SDXL), changed)


@pytest.mark.usefixtures("gpus")
def test_a_pipeline_and_its_workers_are_on_devices_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "__init__", lambda *_, **__: pytest.fail("workers were started"))
    with pytest.raises(ValueError, match="the pipeline is on a GPU and its workers are not"):  # noqa: SIM117
        with parallelize(sdxl(), "cpu"):
            pass
