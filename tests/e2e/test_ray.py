"""Workers that Ray places, on a cluster of a head and two nodes on this machine; `make test-ray`."""

from __future__ import annotations

import importlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import drp
from drp import Leader, WorkerError
from drp.cli import main
from tests.waiting import until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(170),
    pytest.mark.filterwarnings("default"),  # Ray's own warnings
]

TINY = "tests.denoisers:Tiny"
SLOW = "tests.denoisers:make_slow_sine"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray, utils = importlib.import_module("ray"), importlib.import_module("ray.cluster_utils")
    made = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        made.nodes = [made.add_node(num_cpus=4) for _ in range(2)]
        ray.init(address=made.address, log_to_driver=False, configure_logging=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def mixed(cluster: Any) -> Iterator[Leader]:
    """A worker on this machine, and one on each node."""
    with Leader(TINY, devices=["cpu:0", drp.on_ray(workers=2, device="cpu", strategy="STRICT_SPREAD")]) as leader:
        yield leader


@pytest.mark.parametrize("mode", ["aggressive", "conservative", "window", "adaptive", "rolling", "sequential"])
def test_the_bits_of_the_reference(mixed: Leader, mode: str) -> None:
    for drafts in (2, 4, 8):
        options: dict[str, Any] = {"labels": [3, 1], "steps": 24, "mode": mode, "drafts": drafts}
        ours, theirs = mixed.sample(**options), drp.reference(TINY, devices=3, **options)
        assert torch.equal(ours.samples, theirs.samples)
        assert (ours.rounds, ours.evaluations) == (theirs.rounds, theirs.evaluations)


def test_several_runs_at_once(mixed: Leader) -> None:
    options: list[dict[str, Any]] = [{"labels": [k], "steps": 10 + k, "seed": k} for k in range(6)]
    for each, future in [(each, mixed.submit(**each)) for each in options]:
        assert torch.equal(future.result(60).samples, drp.reference(TINY, devices=3, **each).samples)


def test_every_worker_says_on_which_node_it_is(mixed: Leader) -> None:
    first, *others = mixed.devices
    nodes = [re.fullmatch(rf"{re.escape(os.uname().nodename)}-([0-9a-f]{{6}})/cpu", name) for name in others]
    assert first == "cpu:0"
    assert len({node[1] for node in nodes if node}) == 2, others


def test_an_actor_and_a_node_that_are_lost_are_replaced_and_the_bits_stay(cluster: Any) -> None:
    options: dict[str, Any] = {"shape": (4,), "steps": 300, "mode": "aggressive"}
    expected = drp.reference(SLOW, devices=2, **options).samples
    with Leader(SLOW, devices=drp.on_ray(workers=2, device="cpu", strategy="SPREAD")) as leader:
        killed = leader.workers[0].pid

        def kill(step: int, state: object) -> None:
            if step == 50:
                assert killed is not None
                os.kill(killed, signal.SIGKILL)

        result = leader.sample(**options, callback=kill)
        assert torch.equal(result.samples, expected)
        assert re.match(
            rf"worker 0 \(.*/cpu, process {killed}\) (has lost its connection|was lost by Ray)", result.incidents[0]
        )
        until(lambda: leader.workers[0].state == "ready")

        gone = next(node for node in cluster.nodes if node.node_id[:6] in leader.workers[1].device)
        lost = [worker.losses for worker in leader.workers]

        def remove(step: int, state: object) -> None:
            if step == 50:
                gone.kill_raylet()
                for worker in leader.workers:  # Its processes end with a machine; here they must be ended.
                    if gone.node_id[:6] in worker.device and worker.pid is not None:
                        os.kill(worker.pid, signal.SIGKILL)

        result = leader.sample(**options, callback=remove)
        assert torch.equal(result.samples, expected)
        assert gone.node_id[:6] in result.incidents[0]
        until(lambda: all(worker.state == "ready" for worker in leader.workers))
        assert [worker.losses for worker in leader.workers] > lost
        assert not any(gone.node_id[:6] in worker.device for worker in leader.workers)


def test_a_model_that_a_node_cannot_load_is_a_clear_error(cluster: Any) -> None:
    with pytest.raises(WorkerError, match=r"worker 0 \(.*/cpu, process \d+\) failed loading model .*(.|\n)*not there"):
        Leader("tests.denoisers:fail_to_load", devices=drp.on_ray(workers=1, device="cpu"))


def test_a_cluster_without_room_is_a_clear_error(cluster: Any) -> None:
    with pytest.raises(RuntimeError, match=r"Ray has no room for 40 workers with \{'CPU': 1\} each within 1 s"):
        Leader(TINY, devices=drp.on_ray(workers=40, device="cpu", timeout=1.0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"workers": 0}, "workers is 0; give a whole number, 1 to 256"),
        ({"workers": 1, "device": "tpu"}, "device is 'tpu'; give 'cuda', 'cpu' or 'emulated:TIME'"),
        ({"workers": 1, "device": "emulated:5"}, "'5' is not a time"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        drp.on_ray(**arguments)


def test_a_tiny_sdxl_that_each_worker_has_loaded_itself(cluster: Any) -> None:
    pipelines, pipe = importlib.import_module("tests.pipelines"), importlib.import_module("drp.diffusers")
    sdxl, (_, options) = pipelines.sdxl(), pipelines.PIPELINES["SDXL"]
    with pipe.reference(sdxl, devices=2, threads=1):
        expected = pipelines.run(sdxl, options, steps=12)
    workers = drp.on_ray(workers=2, device="cpu", strategy="SPREAD")
    with pipe.parallelize(sdxl, workers, threads=1, pretrained="tests.tiny.builders:sdxl") as parallel:
        assert torch.equal(pipelines.run(sdxl, options, steps=12), expected)
    (call,) = parallel.report.calls
    assert not call.sequential
    assert call.rounds < call.steps


def test_the_command_line(cluster: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = CliRunner().invoke(
        main, ["sample", TINY, "-l", "3,1", "-n", "6", "--ray", "auto", "-d", "2xcpu", "-o", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"2 worker\(s\) on .*-[0-9a-f]{6}/cpu", result.output)
    refused = CliRunner().invoke(main, ["sample", TINY, "--ray", "auto", "-d", "cuda:0,cuda:1"])
    assert "with --ray give a count, such as 8, or 8xcuda or 8xcpu" in refused.output


def test_the_command_line_draws_with_a_pipeline(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "pipelines")
    importlib.import_module("tiny").sdxl().save_pretrained(tmp_path / "sdxl")
    made = []
    for out, where in (("here.npy", []), ("there.npy", ["--ray", "auto"])):
        arguments = ["--diffusers", str(tmp_path / "sdxl"), "--prompt", "a cat", "--steps", "6", "--shape", "32,32"]
        arguments += ["--devices", "2xcpu", "--threads", "1", "--out", str(tmp_path / out), *where]
        result = CliRunner().invoke(main, ["sample", *arguments])
        assert result.exit_code == 0, result.output
        assert "6 steps in 4 rounds" in result.output
        made.append((tmp_path / out).read_bytes())
    assert made[0] == made[1]
