"""A denoiser on a GPU: its weights there, in a dtype of choice, compiled, or as graphs. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drp.models.registry import Denoiser, Predict
from drp.protocol.memory import DTYPES
from drp.protocol.messages import OnGpu

WARM = 3
"""Evaluations before a capture: libraries choose their algorithms and allocate in the first ones."""


def on_device(denoiser: Denoiser, device: torch.device, how: OnGpu) -> Denoiser:
    """Return the denoiser on a device, warmed with the model's own examples if it has some.

    A model that can be warmed has a method `examples()`: arguments (x, t, cond) of calls to come, on the host.
    Raises TypeError for a model that is no module, or that fills slots itself.
    """
    module = denoiser.module
    if module is None or hasattr(denoiser.predict, "fill"):
        raise TypeError("on a GPU a model is a torch.nn.Module from (x, t, cond) to the prediction; this one is not")
    dtype = DTYPES[how.dtype] if how.dtype else None
    module.to(device)
    if dtype is not None:
        module.to(dtype)
    inner: Predict = torch.compile(module, dynamic=False) if how.compile else module
    predict: Predict = Cast(inner, dtype) if dtype is not None else inner
    if how.graphs:
        predict = Captured(predict)
    with torch.inference_mode():
        examples: Any = getattr(module, "examples", tuple)
        for x, t, cond in examples():
            for times in {1, how.batch}:
                given = {k: torch.cat([v] * times) if v.shape[:1] == x.shape[:1] else v for k, v in cond.items()}
                given = {name: value.to(device) for name, value in given.items()}
                predict(torch.cat([x] * times).to(device), torch.cat([t] * times).to(device), given)
    return replace(denoiser, predict=predict)


class Cast:
    """A denoiser in another dtype than its state: x and what is floating in cond go in cast, t does not."""

    def __init__(self, predict: Predict, dtype: torch.dtype) -> None:
        self._predict, self._dtype = predict, dtype

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Predict in that dtype; return in x's."""
        given = {name: value.to(self._dtype) if value.is_floating_point() else value for name, value in cond.items()}
        return self._predict(x.to(self._dtype), t, given).to(x.dtype)


class Captured:
    """A denoiser as CUDA graphs: captured at the first call of each shape, replayed from then on.

    The denoiser must not look at numbers on the host, nor keep what it is given. What it returns is valid until the
    next call.
    """

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self._graphs: dict[object, tuple[Callable[[], object], dict[str, Tensor], Tensor]] = {}

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Replay, or capture first."""
        given = {**{f"cond {name}": value for name, value in cond.items()}, "x": x, "t": t}
        key = tuple((name, value.dtype, tuple(value.shape)) for name, value in sorted(given.items()))
        if key not in self._graphs:
            self._graphs[key] = self._capture(given)
        replay, inputs, output = self._graphs[key]
        for name, value in given.items():
            inputs[name].copy_(value)
        replay()
        return output

    def _capture(self, given: Mapping[str, Tensor]) -> tuple[Callable[[], object], dict[str, Tensor], Tensor]:
        inputs = {name: value.clone() for name, value in given.items()}
        cond = {name.removeprefix("cond "): value for name, value in inputs.items() if name.startswith("cond ")}
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types for it
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self._predict(inputs["x"], inputs["t"], cond)
        torch.cuda.current_stream().wait_stream(side)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._predict(inputs["x"], inputs["t"], cond)
        return graph.replay, inputs, output
