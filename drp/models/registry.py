"""Registry: a model's name is that of one in the package, or `package.module:factory` of the user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from drp.protocol.messages import ModelSpec

Predict = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]

BUILT_IN = {
    "digits": ("drp.models.digits:load", ModelSpec(sample_shape=(1, 28, 28), classes=10, guidance=2.0)),
}


@dataclass(frozen=True)
class Denoiser:
    """A loaded model. `predict(x, t, cond)` takes x [B, ...], t float32 [B] and tensors by name; returns like x."""

    predict: Predict
    spec: ModelSpec

    @property
    def module(self) -> nn.Module | None:
        """The module whose weights can be shared, if it is one."""
        return self.predict if isinstance(self.predict, nn.Module) else None


def describe(name: str) -> ModelSpec | None:
    """Return what is known of a model without loading it; raise ValueError if there can be no such model."""
    if name in BUILT_IN:
        return BUILT_IN[name][1]
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        known = ", ".join(BUILT_IN)
        raise ValueError(f"unknown model {name!r}; built in: {known}; your own are named 'package.module:factory'")
    return None


def load(name: str) -> Denoiser:
    """Load a model into this process, for inference.

    A factory takes no arguments and returns a module or any callable `(x, t, cond) -> prediction`; its attribute
    `spec`, a `ModelSpec`, may say what it expects.
    """
    describe(name)
    factory: Any = importlib.import_module(BUILT_IN.get(name, (name,))[0].partition(":")[0])
    for attribute in BUILT_IN.get(name, (name,))[0].partition(":")[2].split("."):
        factory = getattr(factory, attribute)
    predict = factory()
    if not callable(predict):
        raise TypeError(f"{name} returned {type(predict).__name__}; a factory returns a module or a callable")
    spec = getattr(predict, "spec", ModelSpec())
    if not isinstance(spec, ModelSpec):
        raise TypeError(f"{name}: its spec is a {type(spec).__name__}, not a drp.models.ModelSpec")
    if isinstance(predict, nn.Module):
        predict.eval().requires_grad_(False)
    return Denoiser(predict, spec)
