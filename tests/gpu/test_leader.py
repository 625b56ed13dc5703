"""Leader and workers on one GPU: the bits of a reference there, and nothing left on it afterwards."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import drp
from drp import GpuOptions, Leader

SMALL = "tests.gpu.denoisers:Small"
MODES = ("sequential", "conservative", "aggressive", "rolling", "adaptive")
SLACK = 64 << 20
"""Bytes by which a GPU's free memory may differ without a leak: contexts come and go with worker processes."""


def free() -> int:
    torch.cuda.synchronize()
    nbytes, _ = torch.cuda.mem_get_info()
    return int(nbytes)


@pytest.mark.parametrize("memory", ["auto", "host"])
@pytest.mark.parametrize(("devices", "batch"), [("cuda:0", 1), ("cuda:0", 4), ("3xcuda:0", 1), ("2xcuda:0", 2)])
def test_bits_equal_the_reference_on_the_gpu(
    memory: str, devices: str, batch: int, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        Leader(SMALL, devices=devices, drafts_per_device=batch, gpu=GpuOptions(memory=memory)) as leader,
    ):
        for mode in MODES:
            run = leader.sample(count=2, steps=14, mode=mode, seed=5)
            ref = drp.reference(SMALL, count=2, steps=14, mode=mode, seed=5, devices=devices, drafts_per_device=batch)
            assert torch.equal(run.samples, ref.samples), mode
            assert (run.rounds, run.samples.device.type) == (ref.rounds, "cpu")
    assert not [record for record in caplog.records if "will lie on the host" in record.message]


@pytest.mark.parametrize(
    "gpu", [GpuOptions(graphs=True), GpuOptions(dtype="bfloat16"), GpuOptions(dtype="float16", graphs=True)]
)
def test_options_of_the_worker_keep_the_bits_of_a_reference_with_the_same(gpu: GpuOptions) -> None:
    with Leader(SMALL, devices="cuda:0", drafts_per_device=4, gpu=gpu) as leader:
        run = leader.sample(count=1, steps=20)
    ref = drp.reference(SMALL, devices="cuda:0", drafts_per_device=4, gpu=gpu, count=1, steps=20)
    assert torch.equal(run.samples, ref.samples)


def test_the_gpu_computes_what_the_cpu_does() -> None:
    there = drp.sample(SMALL, devices="cuda:0", steps=12).samples
    here = drp.reference(SMALL, steps=12).samples
    torch.testing.assert_close(there, here, rtol=1e-2, atol=1e-2)  # TF32 convolutions


def test_nothing_is_left_on_the_gpu_after_200_runs() -> None:
    torch.zeros(1, device="cuda")
    before = free()
    with Leader(SMALL, devices="2xcuda:0") as leader:
        leader.sample(steps=4)
        warm = free()
        for run in range(200):
            leader.sample(count=1 + run % 3, steps=4)
        grown = warm - free()
    after = free()
    print(f"before {before >> 20} MiB, in use {warm >> 20}, grown by {grown >> 20}, after {after >> 20}")
    assert grown < SLACK
    assert before - after < SLACK


def test_a_killed_worker_leaves_nothing_and_its_drafts_are_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRP_TEST_DIED", str(tmp_path / "died"))
    torch.zeros(1, device="cuda")
    before = free()
    with Leader("tests.gpu.denoisers:Dying", devices="2xcuda:0") as leader:
        run = leader.sample(steps=16)
    after = free()
    assert (tmp_path / "died").exists()
    assert run.incidents
    assert torch.equal(run.samples, drp.reference(SMALL, devices="2xcuda:0", steps=16).samples)
    assert before - after < SLACK
