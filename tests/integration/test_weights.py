"""Where weights lie: one copy for all who can use it, and nothing compiled or warmed before they lie there.

GPUs are played by the host, see tests/on_host.py; processes, sockets and messages are the real ones.
"""

from __future__ import annotations

import logging
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import drp
from drp import Leader, ModelSpec, WorkerError, models
from drp.leader.job import make_job
from drp.leader.memory.placement import MIN_BLOCK_NBYTES
from drp.leader.request import Request
from drp.models.gpu import Compiled, Graphs, on_device, warmed
from drp.models.registry import Denoiser
from drp.models.state import ModuleState
from drp.protocol.memory import SharedMemory
from drp.protocol.messages import GpuConfig
from drp.sampling.reference import run_reference
from drp.workers.weights import Weights
from tests import on_host
from tests.on_host import steps
from tests.waiting import until
from tests.writing import cond

WATCHED = "tests.on_host:Watched"


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    return on_host.use(monkeypatch, tmp_path)


def what(folder: Path, number: int) -> list[str]:
    """The steps of a worker, without its evaluations after the first."""
    found = [step["what"] for step in steps(folder) if step["number"] == number]
    return found[: found.index("evaluated") + 1]


def inodes(folder: Path) -> dict[int, set[int]]:
    """Where each worker's weights were when they were evaluated: in a file of this inode, 0 for its own memory."""
    found: dict[int, set[int]] = {}
    for step in steps(folder):
        if step["what"] == "evaluated" and step["number"] >= 0:
            found.setdefault(step["number"], set()).add(step["inode"])
    return found


def shared_bytes() -> int:
    """How long the longest memory is that this process shares, but for runs'."""
    sizes = [0]
    for path in Path("/proc/self/fd").iterdir():
        try:
            sizes += [path.stat().st_size] if "memfd:drp " in str(path.readlink()) else []
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return max(size for size in sizes if size < MIN_BLOCK_NBYTES)


def test_workers_of_one_gpu_share_a_copy_and_the_only_one_of_another_keeps_its_own(
    host: dict[str, Any], tmp_path: Path
) -> None:
    with Leader(WATCHED, devices="2xcuda:0,cuda:1", **host) as leader:
        run = leader.sample(count=2, steps=12)
        before = steps(tmp_path)
        pid = leader.workers[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: leader.workers[0].pid not in (None, pid) and leader.workers[0].state == "ready")
        again = leader.sample(count=2, steps=12)
    expected = drp.reference(WATCHED, devices=3, count=2, steps=12).samples
    assert torch.equal(run.samples, expected)
    assert torch.equal(again.samples, expected)
    # A worker that takes a lost one's place takes the copy.
    since = [step["what"] for step in steps(tmp_path)[len(before) :] if step["number"] == 0]
    assert since[: since.index("evaluated") + 1] == ["loaded", "take", "warm", "evaluated"]
    assert what(tmp_path, 2) == ["loaded", "warm", "evaluated"]
    assert sorted([what(tmp_path, 0), what(tmp_path, 1)]) == [
        ["loaded", "publish", "warm", "evaluated"],
        ["loaded", "take", "warm", "evaluated"],
    ]
    places = inodes(tmp_path)
    assert places[0] == places[1]
    assert len(places[0]) == 1
    assert 0 not in places[0]
    assert places[2] == {0}
    assert not [step for step in steps(tmp_path) if step["what"] in ("range", "end")]  # Nobody has asked for them.


def test_weights_are_shared_in_the_dtype_in_which_they_are_used(host: dict[str, Any], tmp_path: Path) -> None:
    host["execution"] = replace(on_host.SYNC, dtype="bfloat16")
    model = "tests.on_host:make_other_dtype"  # before it is cast
    with Leader(model, devices="2xcuda:0", drafts_per_device=2, **host) as leader:
        run = leader.sample(steps=12)
        assert shared_bytes() == 2 * 128 * 128 + 2 * 128
    denoiser = on_device(models.load(WATCHED), torch.device("cpu"), host["execution"].worker_config("", 2))
    job = make_job(Request(steps=12), denoiser.spec, 4)
    ref = run_reference(denoiser.predict, job.solver, job.mode, job.start, job.cond, batch=2)
    assert torch.equal(run.samples, ref.samples)
    used = [step for step in steps(tmp_path) if step["what"] == "evaluated"]
    assert {step["dtype"] for step in used} == {"torch.bfloat16"}
    # Of the examples every batch that may come was evaluated before a worker was ready, the largest first.
    assert [step["size"] for step in used if step["number"] == 0][:2] == [2, 1]


@pytest.mark.parametrize("unreached", ["[0, 1]", "[1]"])
def test_workers_that_cannot_use_the_copy_keep_their_own(
    host: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    unreached: str,
) -> None:
    monkeypatch.setenv("DRP_TEST_UNREACHED", unreached)
    with caplog.at_level(logging.WARNING), Leader(WATCHED, devices="2xcuda:0", **host) as leader:
        run = leader.sample(count=2, steps=12)
        left = shared_bytes()
    assert torch.equal(run.samples, drp.reference(WATCHED, devices=2, count=2, steps=12).samples)
    told = [record.message for record in caplog.records if "weights on" in record.message]
    assert len(told) == 1
    assert re.search(r"weights on GPU-0.* take memory once more each: worker \d .*cudaIpcOpenMemHandle failed", told[0])
    own = {number for number, places in inodes(tmp_path).items() if places == {0}}
    # Whoever is first is to bring the weights: if that is one who cannot, nobody shares, and the copy is given back.
    assert own in ([{0, 1}] if unreached == "[0, 1]" else [{0, 1}, {1}])
    assert (left in on_host.SIZES) is (own == {1})


def test_a_leader_without_memory_for_a_copy_says_so_and_goes_on(
    host: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DRP_TEST_FULL", on_host.GPUS[0].uuid)
    with caplog.at_level(logging.WARNING), Leader(WATCHED, devices="2xcuda:0", **host) as leader:
        leader.sample(steps=6)
    told = [record.message for record in caplog.records if "weights on" in record.message]
    assert len(told) == 1
    assert "the leader cannot share 66048 bytes there: no 66048 bytes on GPU-00000000-first" in told[0]
    places = inodes(tmp_path)
    assert (places[0], places[1]) == ({0}, {0})


def test_a_worker_that_dies_while_it_copies_ends_the_start_with_its_name(
    host: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRP_TEST_DIES", "0")
    with pytest.raises(WorkerError, match=r"worker 0 \(cuda:0, process \d+\) was killed by SIGKILL"):
        Leader(WATCHED, devices="2xcuda:0", **host)
    assert shared_bytes() not in on_host.SIZES


class Mixed(nn.Module):
    """Weights in another memory format, of no size, and of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.register_buffer("none", torch.empty(0, 3))
        self.register_buffer("one", torch.tensor(2.5))
        self.register_buffer("flipped", torch.arange(6.0).view(2, 3).t())
        self.tied = self.conv.weight
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not known to the annotations


def test_weights_lie_in_shared_memory_as_they_lay_before() -> None:
    giver, taker = Mixed(), Mixed()
    weights, others = Weights(giver), Weights(taker)
    assert weights.layout == others.layout != Weights(Mixed().to(memory_format=torch.contiguous_format)).layout  # type: ignore[call-overload]  # likewise
    assert weights.layout != Weights(Mixed().double()).layout
    before = {name: (value.clone(), value.stride()) for name, value in giver.state_dict().items()}
    memory = SharedMemory.create(weights.nbytes)
    weights.share(memory, publish=True)
    others.share(memory, publish=False)
    buffers = dict(taker.named_buffers())
    for name, value in taker.state_dict().items():
        assert torch.equal(value, before[name][0]), name
        assert value.stride() == before[name][1], name
        shared = value.data_ptr() == giver.state_dict()[name].data_ptr()
        assert shared is (name not in buffers or not value.numel()), name
    assert taker.tied is taker.conv.weight
    memory.close()


def test_buffers_are_each_workers_own_on_a_gpu_too(host: dict[str, Any]) -> None:
    run: dict[str, Any] = {"shape": (2, 3), "steps": 9, "mode": "aggressive"}
    with Leader("tests.writing:make_once", devices="2xcuda:0", **host) as leader:
        for kind in ("input", "condition", "workspace", "counter", "replaced buffer", "gradient"):
            samples = leader.sample(cond=cond(kind), **run).samples
            assert torch.equal(
                samples, drp.reference("tests.writing:make_once", devices=2, cond=cond(kind), **run).samples
            )


def test_what_is_written_to_private_memory_stays_in_this_process() -> None:
    memory = SharedMemory.create(8192)
    whole = memory.tensor(0, (2048,), torch.int32)
    private = SharedMemory.open(memory.handle, private=True)
    own = private.tensor(0, (2048,), torch.int32)
    whole[0] = 7
    assert own[0] == 7
    own[0] = 5
    assert whole[0] == 7
    whole[1500] = 9  # on a page that was not written: still shared
    assert own[1500] == 9
    private.close()
    memory.close()


class Scaled(nn.Module):
    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        shift = cond["shift"].view(-1, 1) if "shift" in cond else 0.0
        return torch.sin(x.view(len(x), -1)) * t[:, None] + shift

    def examples(self) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        return [(torch.zeros(2, 3), torch.zeros(2), {"shift": torch.zeros(2)})]


def make_scaled() -> nn.Module:
    return Scaled()


def test_what_was_warmed_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda module, dynamic, options: compile_(module, backend="eager", dynamic=dynamic)
    )
    how = GpuConfig("", compile=True, batch=3)
    denoiser = on_device(models.load("tests.integration.test_weights:make_scaled"), torch.device("cpu"), how)
    assert isinstance(denoiser.predict, Compiled)
    x, shift = torch.randn(2, 3), torch.tensor([0.5, -0.5])
    torch.compiler.set_stance("fail_on_recompile")
    try:
        for times in (1, 2, 3):
            for inside in (False, True):  # Runs on the GPU bring ordinary tensors, others what was copied in the mode.
                with torch.inference_mode(inside):
                    given = {"shift": shift.clone()}
                    inputs = [{"x": x.clone()} for _ in range(times)]
                outputs = [{"x": torch.empty(2, 3)} for _ in range(times)]
                with torch.inference_mode():
                    denoiser.evaluate_batch(inputs, [7.0] * times, given, outputs)
                for output in outputs:
                    torch.testing.assert_close(output["x"], torch.sin(x) * 7 + shift[:, None])
        with pytest.raises(RuntimeError, match="recompile"):
            denoiser.predict(torch.randn(9, 3), torch.zeros(9), {"shift": torch.zeros(9)})
    finally:
        torch.compiler.set_stance("default")


class Counting(nn.Module):
    """It counts its evaluations in a buffer, and predicts by the count."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        self.count += 1
        return x * self.count


def test_what_is_evaluated_before_a_capture_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DRP_TEST_STEPS", str(tmp_path / "steps"))
    monkeypatch.setattr(Graphs, "_capture", on_host.capture)
    module = Counting()
    ready = warmed(Denoiser(module, ModelSpec(), ModuleState(module)), torch.device("cpu"), GpuConfig("", graphs=True))
    for size in (1, 2, 1):
        x = torch.randn(size, 3)
        made = {"x": torch.empty(size, 3)}
        ready.evaluate({"x": x}, 1.0, {}, made)
        assert torch.equal(made["x"], x)  # times 1
    assert [step["what"] for step in steps(tmp_path)] == ["captured"] * 2


def test_all_shapes_are_compiled_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be up to the order in which a worker meets them which ones are not, and have other bits."""
    compile_, compiled = torch.compile, list[Any]()

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(inputs)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda module, dynamic, options: compile_(module, backend=count, dynamic=dynamic)
    )
    predict = Compiled(make_scaled())
    for turn in range(2):
        for size in range(1, 21):
            predict(torch.randn(size, 3), torch.zeros(size), {"shift": torch.zeros(size)})
        assert len(compiled) == 20, turn


def test_a_worker_captures_each_shape_once_and_names_what_it_does_in_ranges(
    host: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [drp.reference(WATCHED, steps=3, count=count, seed=2).samples for count in (1, 2)]
    mine: list[str] = []
    monkeypatch.setattr("torch.cuda.nvtx.range_push", mine.append)
    monkeypatch.setattr("torch.cuda.nvtx.range_pop", lambda: mine.append("end"))
    host["execution"] = replace(on_host.SYNC, graphs=True, nvtx=True)
    with Leader(WATCHED, devices="cuda:0", **host) as leader:
        for count, expected in zip((1, 2, 1, 2), plain * 2, strict=True):
            run = leader.sample(steps=3, count=count, seed=2, callback=lambda k, x: mine.append(f"step {k}"))
            assert torch.equal(run.samples, expected)
    # The one of its examples while it starts, the other at its first draft.
    assert [step["what"] for step in steps(tmp_path)].count("captured") == 2
    ranges = [step.get("name", "end") for step in steps(tmp_path) if step["what"] in ("range", "end")]
    assert ranges.count("end") == len(ranges) // 2
    evaluation = ["drp evaluate", "drp copy in", "end", "drp compute", "end", "drp copy out", "end", "end"]
    at = ranges.index("drp evaluate")
    assert ranges[at : at + 12] == [*evaluation, "drp answer", "end", "drp receive", "end"]
    assert ranges[at - 2] == "drp receive"
    assert mine.count("drp draft") >= 3
    at = mine.index("step 1")
    assert mine[at - 1 : at + 2] == ["drp callback", "step 1", "end"]
    assert "drp refine" in mine[:at]


def test_weights_drawn_without_a_seed_are_the_same_in_every_process() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    run: dict[str, Any] = {"shape": (4,), "steps": 5}
    expected = drp.reference("tests.denoisers:make_unseeded", **run).samples
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(drp.reference("tests.denoisers:make_unseeded", **run).samples, expected)
    assert torch.equal(drp.sample("tests.denoisers:make_unseeded", **run).samples, expected)
