"""What is noticed of a module that changes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from drp.diffusers.structure import describe


@dataclass
class Settings:
    strength: float = 1.0


class Slotted:
    """Has its state in a slot, and attributes too."""

    __slots__ = ("__dict__", "count")

    def __init__(self) -> None:
        self.count = 0


OBJECTS: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "an array": (lambda: np.zeros(3), lambda array: np.copyto(array, 1)),
    "a generator of torch": (torch.Generator, lambda generator: torch.rand(1, generator=generator)),
    "a generator of numpy": (lambda: np.random.default_rng(1), lambda generator: generator.random()),
    "a generator of Python": (lambda: random.Random(1), lambda generator: generator.random()),
    "a queue": (lambda: deque([1]), lambda queue: queue.rotate() or queue.append(2)),
    "a queue of tensors": (lambda: deque([torch.zeros(2)]), lambda queue: queue[0].add_(1)),
    "a set": (lambda: {1}, lambda numbers: (numbers.clear(), numbers.add(2))),
    "a dataclass": (Settings, lambda settings: setattr(settings, "strength", 0.5)),
    "a slot": (Slotted, lambda slotted: setattr(slotted, "count", 1)),
}


@pytest.mark.parametrize("what", OBJECTS)
def test_a_change_of_an_object_among_the_attributes_is_noticed(what: str) -> None:
    make, change = OBJECTS[what]
    module = nn.Linear(2, 2)
    module.other = kept = make()
    described = describe(module)
    assert described.untouched()
    change(kept)
    assert not described.untouched()
    assert not described.same(describe(module))
