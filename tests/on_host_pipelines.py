"""The host in the place of a GPU for pipelines: see tests/on_host.py."""

from __future__ import annotations

import functools
import multiprocessing.spawn
from pathlib import Path

import pytest
import torch

from drp.diffusers import devices, parallel, publish, workers
from drp.leader.devices import parse_devices
from tests import on_host


def use(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have `parallelize` find the stand-in's GPUs, and take a pipeline on the host for one on the first of them."""
    python = on_host.use(monkeypatch, folder)["python"]
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", str(python))
    for module in (parallel, workers):
        monkeypatch.setattr(module, "parse_devices", functools.partial(parse_devices, find=lambda: on_host.GPUS))
    monkeypatch.setattr(parallel, "device_of", lambda pipe, names: torch.device("cuda", 0))
    monkeypatch.setattr(devices, "uuid_of", lambda index: on_host.GPUS[index].uuid)
    monkeypatch.setattr(publish, "GpuMemory", on_host.HostGpuMemory)
