"""Models of many kinds: each runs, and each has its weights shared."""

from __future__ import annotations

import random
import re
import threading
import time
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import drp
from drp import models
from drp.protocol.memory import SharedMemory
from drp.workers.weights import Weights


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        out: Tensor = 0.1 * self.layer(x)
        return out


class Scriptable(nn.Module):
    """The same, with annotations that TorchScript knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        out: Tensor = 0.1 * self.layer(x)
        return out


class Hollow(nn.ModuleList):
    """A module whose len() is 0, and which is false."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return 0.1 * x * self.weight


class Noisy(Layer):
    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.dropout(super().forward(x, t, cond), 0.3, training=True)


class Slow(Layer):
    """Takes long enough that another thread draws meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        for parameter in self.parameters():
            parameter.data.fill_(0.1)

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        time.sleep(0.02)
        return super().forward(x, t, cond)


class NoisyByNumpy(Layer):
    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return super().forward(x, t, cond) * float(np.random.rand())


class NoisyByPython(Layer):
    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return super().forward(x, t, cond) * random.random()


class Seeding(Layer):
    """Draws numbers that it has seeded, from torch's own generator and from one of its own."""

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        torch.manual_seed(0)
        own = torch.Generator().manual_seed(int(t[0]))
        return super().forward(x, t, cond) + 0.1 * torch.randn_like(x) + 0.1 * torch.randn(x.shape, generator=own)


def make_layer() -> nn.Module:
    torch.manual_seed(0)
    return Layer()


def make_scripted() -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        scripted: nn.Module = torch.jit.script(Scriptable())
    return scripted


def make_compiled() -> nn.Module:
    compiled: nn.Module = torch.compile(make_layer(), backend="eager")  # type: ignore[assignment]  # of a module it is one
    return compiled


def make_exported_program() -> torch.export.ExportedProgram:
    return torch.export.export(make_layer(), (torch.randn(2, 3, 4), torch.ones(2), {}))


def make_exported() -> nn.Module:
    return make_exported_program().module()


OPTIONS = {"shape": (3, 4), "count": 2, "steps": 4, "seed": 0}


@pytest.mark.parametrize("factory", [make_scripted, make_compiled, make_exported, make_exported_program])
def test_what_torch_makes_of_a_module_computes_the_same(factory: object) -> None:
    expected = drp.reference(make_layer, **OPTIONS).samples  # type: ignore[arg-type]
    assert torch.equal(drp.reference(factory, **OPTIONS).samples, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("factory", ["make_layer", "make_scripted", "make_compiled", "make_exported", "Hollow"])
def test_its_weights_are_shared(factory: str) -> None:
    """The second has other weights, and takes the first one's."""
    first, second = (models.load(f"tests.unit.test_own_models:{factory}") for _ in range(2))
    assert second.module is not None
    for parameter in second.module.parameters():
        parameter.add_(1.0)
    x, t = torch.randn(2, 3, 4), torch.ones(2)
    with torch.inference_mode():
        expected = first.predict(x, t, {}).clone()
        assert not torch.equal(second.predict(x, t, {}), expected)
        memory = SharedMemory.create(Weights(first.module).nbytes)
        Weights(first.module).share(memory, publish=True)
        Weights(second.module).share(memory, publish=False)
        for denoiser in (first, second):
            assert torch.equal(denoiser.predict(x, t, {}), expected)
    memory.close()


DRAWS: dict[str, Any] = {"shape": (4,), "steps": 5, "mode": "sequential", "seed": 3}


@pytest.mark.parametrize("model", ["Noisy", "NoisyByNumpy", "NoisyByPython"])
def test_a_model_that_draws_random_numbers_is_refused(model: str) -> None:
    with pytest.raises(RuntimeError, match=r"the denoiser draws random numbers.*torch\.Generator"):
        drp.reference(f"tests.unit.test_own_models:{model}", **DRAWS)


def test_a_model_may_seed_the_random_numbers_that_it_draws() -> None:
    first, second = (drp.reference("tests.unit.test_own_models:Seeding", **DRAWS).samples for _ in range(2))
    assert torch.equal(first, second)


def test_random_numbers_that_another_thread_draws_are_not_blamed_on_the_model() -> None:
    ends = threading.Event()

    def draw() -> None:
        while not ends.wait(1e-4):
            torch.rand(1)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        slow = drp.reference("tests.unit.test_own_models:Slow", **DRAWS).samples
    finally:
        ends.set()
        thread.join()
    assert torch.equal(slow, drp.reference("tests.unit.test_own_models:Slow", **DRAWS).samples)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Layer(), "model of type Layer cannot be imported by a worker; define a function at the top of a module"),
        (lambda: Layer(), "model <lambda> cannot be imported by a worker"),
        (partial(Layer), "model of type partial cannot be imported by a worker"),
        (Layer().eval, "model Module.eval cannot be imported by a worker"),
        ("./my_model.py:make", "unknown model './my_model.py:make'; built in: digits; your own are named 'package.m"),
        ("my_model", "unknown model 'my_model'"),
    ],
)
def test_a_model_that_no_worker_can_import_is_refused_with_the_remedy(model: Any, words: str) -> None:
    for call in (drp.sample, drp.reference):
        with pytest.raises(ValueError, match=re.escape(words)):
            call(model, shape=(4,))
