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
from drp.diffusers.publish import Publisher
from drp.diffusers.structure import describe


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
