"""Where the command line puts the pipelines that it loads. No GPU is needed: the move itself is recorded."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from drp.diffusers import devices
from drp.diffusers.devices import move_to_gpu
from drp.diffusers.digits import digits_pipeline
from drp.leader.devices import parse_devices
from drp.leader.gpus import Gpu

GPUS = (Gpu(0, "GPU-aa", cores=(0,)), Gpu(1, "GPU-bb", cores=(0,)))


@pytest.mark.parametrize(
    ("names", "moved"),
    [("2xcpu", []), ("cuda:1,cuda:0", ["cuda:1"]), ("2xcuda", ["cuda:0"]), (["cpu:0", "cpu:0"], [])],
)
def test_a_pipeline_on_the_host_is_moved_to_the_first_gpu_named(
    names: str | list[str], moved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, to = digits_pipeline(), list[str]()
    monkeypatch.setattr(devices, "find_gpus", lambda: GPUS)
    monkeypatch.setattr(devices, "parse_devices", lambda given, threads: parse_devices(given, threads, lambda: GPUS))
    monkeypatch.setattr(pipe, "to", lambda where: to.append(str(where)))
    move_to_gpu(pipe, names)
    assert to == moved


def test_a_pipeline_that_is_offloaded_to_the_host_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = digits_pipeline()
    monkeypatch.setattr(devices, "find_gpus", lambda: GPUS)
    monkeypatch.setattr(devices, "parse_devices", lambda given, threads: parse_devices(given, threads, lambda: GPUS))
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda:0"))
    monkeypatch.setattr(pipe, "to", lambda where: pytest.fail(f"moved to {where}"))
    move_to_gpu(pipe, "cuda:1")
