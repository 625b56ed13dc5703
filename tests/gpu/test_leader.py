"""Leader and workers on one GPU: the bits of a reference there, and nothing left on it afterwards."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import drp
from drp import ExecutionOptions, Leader
from drp.models import load
from drp.models.gpu import Captured, on_device
from drp.protocol.cuda import index_of
from drp.protocol.messages import GpuConfig
from drp.sampling.run import Task

SMALL = "tests.gpu.denoisers:Small"
MODES = ("sequential", "conservative", "aggressive", "window", "rolling", "adaptive")
SLACK = 64 << 20
"""Bytes by which a GPU's free memory may differ without a leak: contexts come and go with worker processes."""


@pytest.fixture
def _one_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile in this process: others that helped it would stay."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)


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
        Leader(SMALL, devices=devices, drafts_per_device=batch, execution=ExecutionOptions(memory=memory)) as leader,
    ):
        for mode in MODES:
            run = leader.sample(count=2, steps=14, mode=mode, seed=5)
            ref = drp.reference(SMALL, count=2, steps=14, mode=mode, seed=5, devices=devices, drafts_per_device=batch)
            assert torch.equal(run.samples, ref.samples), mode
            assert (run.rounds, run.samples.device.type) == (ref.rounds, "cpu")
    assert not [record for record in caplog.records if "will lie on the host" in record.message]


@pytest.mark.parametrize(
    "gpu",
    [
        pytest.param(ExecutionOptions(graphs=True), id="graphs"),
        pytest.param(ExecutionOptions(dtype="bfloat16"), id="bfloat16"),
        pytest.param(ExecutionOptions(dtype="float16", graphs=True), id="float16 graphs"),
        pytest.param(ExecutionOptions(nvtx=True), id="nvtx"),
        pytest.param(ExecutionOptions(compile=True), id="compile"),
        pytest.param(ExecutionOptions(compile=True, graphs=True, dtype="bfloat16"), id="compile graphs bfloat16"),
    ],
)
@pytest.mark.usefixtures("_one_compiler")
def test_options_of_the_worker_keep_the_bits_of_a_reference_with_the_same(gpu: ExecutionOptions) -> None:
    with Leader(SMALL, devices="cuda:0", drafts_per_device=4, execution=gpu) as leader:
        run = leader.sample(count=1, steps=20)
    ref = drp.reference(SMALL, devices="cuda:0", drafts_per_device=4, execution=gpu, count=1, steps=20)
    assert torch.equal(run.samples, ref.samples)


@pytest.mark.usefixtures("_one_compiler")
def test_compiled_code_computes_what_the_model_does() -> None:
    with Leader(SMALL, devices="cuda:0", drafts_per_device=2, execution=ExecutionOptions(compile=True)) as leader:
        for count in (1, 2):  # what was warmed, and what was not
            run = leader.sample(count=count, steps=10)
            ref = drp.reference(SMALL, devices="cuda:0", drafts_per_device=2, count=count, steps=10)
            torch.testing.assert_close(run.samples, ref.samples, rtol=1e-2, atol=1e-2)


def test_a_model_that_looks_at_numbers_cannot_be_captured_and_is_told_so() -> None:
    with pytest.raises(drp.WorkerError, match=r"cannot be captured as a CUDA graph(.|\n)*leave graphs out"):
        Leader("tests.gpu.denoisers:Looking", devices="cuda:0", execution=ExecutionOptions(graphs=True))
    with Leader("tests.gpu.denoisers:Looking", devices="cuda:0") as leader:
        assert leader.sample(steps=3).steps == 3


def test_graphs_of_several_shapes_share_memory_without_harm(uuid: str) -> None:
    device = torch.device("cuda", index_of(uuid))
    captured = on_device(load(SMALL), device, GpuConfig(uuid, graphs=True, batch=2)).predict
    assert isinstance(captured, Captured)
    assert len(captured.graphs) == 2  # alone and as a batch, from the model's examples
    plain = on_device(load(SMALL), device, GpuConfig(uuid)).predict
    with torch.inference_mode():
        for turn, size in enumerate((1, 3, 2, 1, 5, 3, 1)):
            x, t = torch.randn(size, 4, 32, 32, device=device), torch.full((size,), 10.0 * turn, device=device)
            assert torch.equal(captured(x, t, {}), plain(x, t, {})), (turn, size)
            assert len(captured.graphs) == (2 if turn == 0 else 4 if turn > 3 else 3), (turn, size)
    assert torch.equal(captured(x, t, {}), plain(x, t, {}))  # outside that mode too


def used() -> int:
    """Bytes of the GPU that are in use, by all processes."""
    torch.cuda.synchronize()
    left, most = torch.cuda.mem_get_info()
    return int(most - left)


def test_workers_of_one_gpu_have_one_copy_of_the_weights(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {}
    for model in ("Few", "Large"):
        with Leader(f"tests.gpu.denoisers:{model}", devices="4xcuda:0") as leader:
            samples = leader.sample(steps=9).samples
            sizes[model] = used()
            pid = leader.workers[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            deadline = time.monotonic() + 120
            while leader.workers[0].pid in (None, pid) or leader.workers[0].state != "ready":
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert torch.equal(leader.sample(steps=9).samples, samples)
            sizes[f"{model} again"] = used()
    print({name: f"{size / 2**30:.2f} GiB" for name, size in sizes.items()})
    assert 1.0 <= (sizes["Large"] - sizes["Few"]) / 2**30 < 1.5
    assert 1.0 <= (sizes["Large again"] - sizes["Few again"]) / 2**30 < 1.5
    for model in ("Few", "Large"):
        assert abs(sizes[f"{model} again"] - sizes[model]) < SLACK
    assert not [record for record in caplog.records if "weights on" in record.message]


@pytest.mark.parametrize("gpu", [ExecutionOptions(graphs=True), ExecutionOptions(memory="host")])
def test_shared_weights_are_those_that_are_used(gpu: ExecutionOptions) -> None:
    with Leader("tests.gpu.denoisers:Drawn", devices="3xcuda:0", execution=gpu) as leader:
        one, again = (leader.sample(steps=9).samples for _ in range(2))
    assert torch.equal(one, again)


EXPANDABLE = f"""
import torch, drp
with drp.Leader({SMALL!r}, devices="2xcuda:0") as leader:
    samples = leader.sample(steps=9).samples
assert leader.internals.placement.shares_gpu_memory
assert torch.equal(samples, drp.reference({SMALL!r}, steps=9, devices="2xcuda:0").samples)
"""


def test_torchs_allocator_may_have_expandable_segments() -> None:
    """CUDA IPC refuses memory from these, but what is shared is not torch's."""
    env = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run([sys.executable, "-c", EXPANDABLE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "will lie on the host" not in done.stderr


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


def test_nothing_is_left_on_the_gpu_after_200_sessions() -> None:
    """Sessions lie on the host: what could be left is memory that was pinned, and copies of their conditions."""
    x = torch.randn(1, 4, 32, 32)
    with Leader(SMALL, devices="cuda:0") as leader:
        made, warm = [], 0
        for number in range(200):
            session = leader.open_session({"x": x}, {"x": x}, 2, {"unused": torch.ones(1 << 20)})
            session.arena.draft(1)["x"].copy_(x)
            rows = session.evaluate([Task(3, 250.0, 1)])
            made.append(session.arena.prediction(rows[3])["x"].clone())
            session.close()
            assert torch.equal(made[-1], made[0])
            warm = used() if number == 10 else warm
        assert used() - warm < SLACK


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
