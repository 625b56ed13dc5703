"""Pipelines of diffusers with tiny networks on one GPU: the bits of one process, and one copy of the weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from drp import ExecutionOptions
from drp.diffusers import Workers, parallelize, reference
from tests.pipelines import IMAGE, PIPELINES, check_bits, drafted, run
from tests.tiny.builders import flux, normal, pooled, prompts, sdxl

GPU = "cuda:0"
SDXL = {**prompts(1, 6, 8), **pooled(), **IMAGE}


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(f"2x{GPU}", threads=1) as made:
        yield made


def there(pipe: Any, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Any]]:
    """Move a pipeline and the arguments of a call to the GPU."""
    pipe.to(GPU, dtype)
    return pipe, {
        name: value.to(GPU, dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in options.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["SDXL", "SD 1.5", "DiT", "Flux", "SD 3"])
def test_workers_have_the_bits_of_one_process(name: str, dtype: torch.dtype, workers: Workers) -> None:
    make, given = PIPELINES[name]
    pipe, options = there(make(), given, dtype)
    check_bits(pipe, options, workers, f"2x{GPU}")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["SDXL", "Flux"])
def test_a_step_as_a_graph_has_the_bits_of_one_process(name: str, batch: int) -> None:
    make, given = PIPELINES[name]
    pipe, options = there(make(), given)
    _, other = there(pipe, {**given, "prompt_embeds": normal(1, 6, 8, seed=5)})
    expected = []
    for each in (options, other):
        with reference(pipe, devices=GPU, mode="aggressive", drafts=4, drafts_per_device=batch):
            expected.append(run(pipe, each))
    how = ExecutionOptions(graphs=True)
    with parallelize(pipe, GPU, "aggressive", drafts=4, drafts_per_device=batch, execution=how) as parallel:
        for each, wanted in zip((options, other), expected, strict=True):
            assert torch.equal(run(pipe, each), wanted)
    for report in parallel.report.calls:
        drafted(report)


def test_weights_in_place_an_offloaded_pipeline_and_inference_mode(workers: Workers) -> None:
    pipe, options = there(sdxl(), SDXL)
    with parallelize(pipe, workers, "aggressive"):
        run(pipe, options)
        pipe.unet.conv_in.weight.data.mul_(1.1)
        changed = run(pipe, options)
    with reference(pipe, devices=f"2x{GPU}", mode="aggressive"):
        assert torch.equal(run(pipe, options), changed)
    pipe.to("cpu")
    pipe.enable_model_cpu_offload()
    with parallelize(pipe, workers, "aggressive") as parallel:
        assert torch.equal(run(pipe, options), changed)
        with torch.inference_mode():
            assert torch.equal(run(pipe, options), changed)
    for report in parallel.report.calls:
        drafted(report)
    assert pipe.unet.device.type == "cpu"


def test_a_lost_worker_s_drafts_are_evaluated_by_another() -> None:
    pipe, options = there(sdxl(), SDXL)
    with reference(pipe, devices=f"2x{GPU}", mode="aggressive"):
        expected = run(pipe, options)
    with Workers(f"2x{GPU}", threads=1) as workers:

        def kill(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
            if i == 2:
                os.kill(workers.status[1].pid or 0, signal.SIGKILL)
            return {}

        with parallelize(pipe, workers, "aggressive") as parallel:
            assert torch.equal(run(pipe, {**options, "callback_on_step_end": kill}), expected)
    drafted(parallel.report.calls[0])


@pytest.mark.parametrize("memory", ["host", "auto"])
def test_runs_on_the_host_and_on_the_gpu(memory: str) -> None:
    pipe, options = there(sdxl(), SDXL, torch.bfloat16)
    pipe.unet.to(memory_format=torch.channels_last)
    with reference(pipe, devices=f"2x{GPU}", mode="aggressive"):
        expected = run(pipe, options)
    with parallelize(pipe, f"2x{GPU}", "aggressive", execution=ExecutionOptions(memory=memory)) as parallel:
        assert torch.equal(run(pipe, options), expected)
    drafted(parallel.report.calls[0])


@pytest.mark.parametrize("how", ["compile", "compile_repeated_blocks"])
def test_workers_compile_what_was_compiled(how: str, workers: Workers) -> None:
    pipe, options = there(flux(), PIPELINES["Flux"][1])
    getattr(pipe.transformer, how)(dynamic=False)
    with reference(pipe, devices=f"2x{GPU}", mode="aggressive"):
        expected = run(pipe, options)
    with parallelize(pipe, workers, "aggressive") as parallel:
        torch.testing.assert_close(run(pipe, options), expected, rtol=1e-2, atol=1e-2)
    drafted(parallel.report.calls[0])


def test_repeated_parallelizations_take_no_more_memory(workers: Workers) -> None:
    pipe, options = there(sdxl(), SDXL)
    free = []
    for _ in range(4):
        with parallelize(pipe, workers, "aggressive"):
            run(pipe, options)
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    print([f"{nbytes >> 20} MiB" for nbytes in free])
    assert free[1] - free[-1] < 16 << 20
