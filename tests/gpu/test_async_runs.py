"""Answers ahead of the GPU: the same bits, no wait on the host, and what is not proven is computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import drp
from drp import ExecutionOptions, Leader

SMALL = "tests.gpu.denoisers:Small"
MODES = ("sequential", "conservative", "aggressive", "window", "rolling", "adaptive")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cudaMemcpy2D")
"""Calls that return when the GPU has come to some point."""


def options(memory: str = "auto", **more: Any) -> ExecutionOptions:
    return ExecutionOptions(dispatch="async", memory=memory, **more)


@pytest.mark.parametrize("memory", ["auto", "host"])
@pytest.mark.parametrize(("devices", "batch"), [("cuda:0", 1), ("cuda:0", 4), ("3xcuda:0", 1), ("2xcuda:0", 2)])
def test_bits_and_callbacks_are_the_references(memory: str, devices: str, batch: int) -> None:
    with Leader(SMALL, devices=devices, drafts_per_device=batch, execution=options(memory)) as leader:
        for mode in MODES:
            mine, theirs = dict[int, torch.Tensor](), dict[int, torch.Tensor]()
            asked: dict[str, Any] = {"count": 2, "steps": 14, "mode": mode, "seed": 5}
            run = leader.sample(**asked, callback=lambda k, x, to=mine: to.update({k: x.cpu().clone()}))  # type: ignore[misc]  # a default is its own type
            ref = drp.reference(
                SMALL,
                **asked,
                devices=devices,
                drafts_per_device=batch,
                callback=lambda k, x, to=theirs: to.update({k: x.cpu().clone()}),  # type: ignore[misc]  # likewise
            )
            assert torch.equal(run.samples, ref.samples), mode
            assert (run.rounds, run.samples.device.type, run.incidents) == (ref.rounds, "cpu", ())
            assert list(mine) == list(range(1, 15))
            assert all(torch.equal(mine[k], theirs[k]) for k in mine), mode


@pytest.mark.parametrize("solver", ["ddpm", "unipc"])
def test_noise_and_a_memory_of_steps(solver: str) -> None:
    graphs = options(graphs=True)
    with Leader(SMALL, devices="2xcuda:0", execution=graphs) as leader:
        for seed in range(3):
            run = leader.sample(steps=20, solver=solver, seed=seed)
            ref = drp.reference(SMALL, devices="2xcuda:0", execution=graphs, steps=20, solver=solver, seed=seed)
            assert torch.equal(run.samples, ref.samples)


def test_evaluations_are_timed() -> None:
    with Leader(SMALL, devices="2xcuda:0", execution=options()) as leader:
        run = leader.sample(count=2, steps=48)
        sync = drp.sample(SMALL, devices="2xcuda:0", execution=ExecutionOptions(dispatch="sync"), count=2, steps=48)
    assert 0 < run.device_seconds < 4 * run.seconds
    assert run.device_seconds < 2 * sync.device_seconds


def test_several_runs_at_once() -> None:
    with Leader(SMALL, devices="3xcuda:0", execution=options()) as leader:
        pending = [leader.submit(steps=20, seed=seed, mode="conservative") for seed in range(8)]
        for seed, run in enumerate(pending):
            ref = drp.reference(SMALL, devices="3xcuda:0", steps=20, seed=seed, mode="conservative")
            assert torch.equal(run.result(60.0).samples, ref.samples)


def test_the_host_waits_for_no_gpu_between_two_drafts(tmp_path: Path) -> None:
    """From the first round that is formed to the last, the leader's thread calls nothing that waits."""
    with Leader(SMALL, devices="3xcuda:0", execution=options()) as leader:
        leader.sample(count=2, steps=48)  # Memory is allocated, and rows are worked out.
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            leader.sample(count=2, steps=48)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    calls = sorted((e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")), key=lambda e: float(e["ts"]))
    thread = next(e["tid"] for e in calls if e["name"].startswith("cudaEventRecord"))
    calls = [e for e in calls if e["tid"] == thread]
    rounds = [place for place, e in enumerate(calls) if e["name"].startswith("cudaEventRecord")]
    assert len(rounds) >= 16, f"the trace has {len(calls)} calls, and {len(rounds)} rounds that were formed"
    between = calls[rounds[0] : rounds[-1]]
    copies = [e for e in between if e["name"].startswith("cudaMemcpyAsync")]
    print(f"{len(between)} calls of the runtime, {len(copies)} of them copies, between the first round and the last")
    assert len(copies) >= 30  # of stamps, at least
    assert not [e["name"] for e in between if e["name"].startswith(WAITS) and "Async" not in e["name"]]


@pytest.mark.parametrize("memory", ["auto", "host"])
@pytest.mark.parametrize(
    ("model", "words"),
    [("Dying", "SIGKILL"), ("Stale", "without a valid completion record"), ("Asserting", "device-side assert")],
)
def test_what_was_not_proven_is_computed_again(
    model: str, words: str, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRP_TEST_DIED", str(tmp_path / "died"))
    name, execution = f"tests.gpu.denoisers:{model}", options(memory)
    with Leader(name, devices="2xcuda:0", execution=execution, draft_timeout=30.0) as leader:
        run = leader.sample(steps=16)
        assert torch.equal(run.samples, drp.reference(SMALL, devices="2xcuda:0", steps=16).samples)
        assert words in "\n".join(run.incidents)
        assert not leader.sample(steps=16).incidents


def test_a_lost_context_ends_the_worker_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRP_TEST_DIED", str(tmp_path / "died"))
    with Leader("tests.gpu.denoisers:Asserting", devices="2xcuda:0") as leader:
        run = leader.sample(steps=16)
        assert torch.equal(run.samples, drp.reference(SMALL, devices="2xcuda:0", steps=16).samples)
        assert "device-side assert triggered" in run.incidents[0]
        assert sorted(worker.losses for worker in leader.workers) == [0, 1]
