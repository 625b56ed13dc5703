"""How weights are moved to the memory that workers share."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from drp.diffusers import publish
from drp.diffusers.publish import GpuWeights, Publisher
from drp.diffusers.structure import describe
from tests.on_host import GPUS, HostGpuMemory


def test_weights_need_memory_twice_in_groups_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that a pipeline fills by half could not hold it otherwise: what a group leaves is freed before the next."""
    monkeypatch.setattr(publish, "MAX_BLOCK_NBYTES", 1)  # Each weight is a group.
    module = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    former = []
    for layer in module:
        assert isinstance(layer, nn.Linear)
        array = np.ones((8, 8), np.float32)
        former.append(weakref.ref(array))
        layer.weight.data = torch.from_numpy(array)
        del array
    publisher, left = Publisher(), list[int]()
    create = publisher._create

    def count(*arguments: Any) -> Any:
        left.append(sum(each() is not None for each in former))
        return create(*arguments)

    monkeypatch.setattr(publisher, "_create", count)
    described = describe(module)
    publisher.publish("module", described)
    assert left == [4, 3, 2, 1]
    assert described.untouched()
    publisher.close()


def test_a_gpu_with_too_little_memory_costs_the_others_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "GpuMemory", HostGpuMemory)
    monkeypatch.setenv("DRP_TEST_FULL", GPUS[1].uuid)
    gpus = GpuWeights(GPUS[0].uuid, (GPUS[1].uuid,), True)
    publisher, described = Publisher(gpus), describe(nn.Linear(256, 256))
    for _ in range(2):  # as in two calls of a pipeline
        with pytest.raises(MemoryError, match=f"bytes on {GPUS[1].uuid}"):
            publisher.publish("module", described)
    assert gpus.exported == []
    monkeypatch.setenv("DRP_TEST_FULL", "")
    publisher.publish("module", described)
    assert len(gpus.exported) == 2
    publisher.close()
    gpus.close()
