"""Several GPUs: memory of one GPU reached by workers on others, and a pipeline that is not on the current GPU."""

from __future__ import annotations

import logging
import subprocess
from typing import Any

import pytest
import torch

import drp
from drp import ExecutionOptions, Leader
from drp.protocol.cuda import uuid_of

SMALL = "tests.gpu.denoisers:Small"
MODES = ("sequential", "conservative", "aggressive", "window", "rolling", "adaptive")

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs")


@pytest.mark.parametrize("dispatch", ["sync", "async"])
@pytest.mark.parametrize("memory", ["auto", "host"])
def test_workers_on_all_gpus_have_the_bits_of_the_reference(memory: str, dispatch: str) -> None:
    count = torch.cuda.device_count()
    how = ExecutionOptions(memory=memory, dispatch=dispatch)
    with Leader(SMALL, devices=count, execution=how) as leader:
        assert [name.partition(":")[0] for name in leader.devices] == ["cuda"] * count
        for mode in MODES:
            run = leader.sample(count=2, steps=14, mode=mode, seed=5)
            ref = drp.reference(SMALL, count=2, steps=14, mode=mode, seed=5, devices=count)
            assert torch.equal(run.samples, ref.samples), mode


def pipeline(device: str) -> tuple[Any, dict[str, Any]]:
    pytest.importorskip("diffusers")
    from tests.gpu.test_pipelines import SDXL, there
    from tests.tiny.builders import sdxl

    pipe, options = there(sdxl(), SDXL)
    pipe.to(device)
    return pipe, {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}


@pytest.mark.parametrize(
    ("home", "devices"),
    [
        ("cuda:0", None),  # as many as there are: what the README shows
        ("cuda:1", "cuda:1,cuda:0"),
        ("cuda:1", "2xcuda:0"),  # no worker on the pipeline's GPU
        ("cuda:1", "2xcuda:1"),  # and the program's current GPU is another
    ],
)
def test_a_pipeline_on_any_gpu_with_workers_on_any(
    home: str, devices: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    from drp.diffusers import parallelize, reference
    from tests.pipelines import drafted, run

    pipe, options = pipeline(home)
    names = devices or f"{torch.cuda.device_count()}xcuda"
    with reference(pipe, devices=names, mode="aggressive"):
        expected = run(pipe, options)
    assert torch.cuda.current_device() == 0
    with caplog.at_level(logging.WARNING), parallelize(pipe, names, "aggressive") as parallel:
        assert torch.equal(run(pipe, options), expected)
        pipe.unet.conv_in.weight.data.mul_(1.1)  # The copies on other GPUs follow.
        changed = run(pipe, options)
    with reference(pipe, devices=names, mode="aggressive"):
        assert torch.equal(run(pipe, options), changed)
    for report in parallel.report.calls:
        drafted(report)
    print([record.message for record in caplog.records])  # whether runs lie on the host, since there are no peers
    assert torch.cuda.current_device() == 0


def test_a_worker_has_a_context_on_its_own_gpu_only() -> None:
    """Each other one would take a few hundred MB of the GPU of the runs, which is the fullest."""
    query = ("nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader")
    with Leader(SMALL, devices="cuda:0,cuda:1") as leader:
        leader.sample(steps=9)
        on_gpu = leader.internals.placement.on_gpu
        pids = [str(worker.pid) for worker in leader.workers]
        listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    found = {(pid.strip(), uuid.strip()) for pid, uuid in (line.split(",") for line in listed)}
    if not on_gpu or pids[0] not in {pid for pid, _ in found}:
        pytest.skip("these GPUs are no peers, or nvidia-smi does not see the processes of this container")
    assert {pair for pair in found if pair[0] in pids} == set(zip(pids, (uuid_of(0), uuid_of(1)), strict=True))
