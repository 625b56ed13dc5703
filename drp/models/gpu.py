"""Preparation of a denoiser for a GPU: dtype, compilation and CUDA graphs.

There are two steps, `in_dtype` and `warmed`. The weights may be moved between them, and compilation and capture need
their final addresses.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from drp.models.registry import Denoiser, Predict
from drp.protocol.memory import DTYPES
from drp.protocol.messages import GpuConfig

T = TypeVar("T")

WARM = 3
"""Evaluations before a capture, in which libraries choose their algorithms and allocate memory."""
LIMITS = ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit")
"""Names of torch's limits on the number of compiled shapes, in different versions."""


def synchronize(device: torch.device) -> None:
    """Wait for the work that this thread has queued on a device."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def on_device(denoiser: Denoiser, device: torch.device, config: GpuConfig) -> Denoiser:
    """Return the denoiser on a device, ready for its first draft; raise TypeError for a model that cannot be moved."""
    return warmed(in_dtype(denoiser, config), device, config)


def in_dtype(denoiser: Denoiser, config: GpuConfig) -> Denoiser:
    """Return the denoiser with its weights in the requested dtype, without moving them.

    Raises TypeError for a model that is not a module, or that has a method `fill`.
    """
    module = denoiser.module
    if module is None or hasattr(denoiser.predict, "fill"):
        raise TypeError("on a GPU a model is a torch.nn.Module from (x, t, cond) to the prediction; this one is not")
    if config.dtype:
        module.to(DTYPES[config.dtype])
    return denoiser


def warmed(denoiser: Denoiser, device: torch.device, config: GpuConfig) -> Denoiser:
    """Move a denoiser, already cast, to a device, and do the work that would delay its first evaluation.

    Weights that are on the device already keep their addresses. A model that can be warmed up has a method
    `examples()`, which yields arguments (x, t, cond) of future calls, on the host. Each example is evaluated in all
    batch sizes that `config` allows, as in a worker, the largest first, so that the memory of its graph is reused.
    """
    module = denoiser.module
    assert module is not None
    module.to(device)
    denoiser.state.capture()
    predict: Predict = Compiled(module) if config.compile else module
    if config.dtype:
        predict = Cast(predict, DTYPES[config.dtype])
    if config.graphs:
        predict = Captured(predict, denoiser.state.restore)
    ready = replace(denoiser, predict=predict)
    examples: Any = getattr(module, "examples", tuple)
    for x, t, cond in examples():
        draft, given = {"x": x.to(device)}, {name: value.to(device) for name, value in cond.items()}
        outputs = [{"x": torch.empty_like(draft["x"])} for _ in range(config.batch)]
        for times in range(config.batch, 0, -1):
            ready.evaluate_batch([draft] * times, [float(t[0])] * times, given, outputs[:times])
    return ready


class Cast:
    """A denoiser with another dtype than its state: x and floating-point conditions are cast, t is not."""

    def __init__(self, predict: Predict, dtype: torch.dtype) -> None:
        self._predict, self._dtype = predict, dtype

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Evaluate in that dtype; return the prediction in the dtype of x."""
        given = {name: value.to(self._dtype) if value.is_floating_point() else value for name, value in cond.items()}
        return self._predict(x.to(self._dtype), t, given).to(x.dtype)


class Compiled:
    """A module compiled by torch.compile for each shape, called outside inference mode with ordinary tensors.

    The compiler treats inference tensors as a different kind, so that the same shape would be compiled again
    (pytorch/pytorch#134249), and it fails in inference mode for models that use views (pytorch/pytorch#180823).

    All shapes are compiled. Beyond a limit, torch would evaluate further shapes without compilation, with different
    bits, and which shapes these are would depend on the order of evaluations in a worker.

    Unless the environment overrides it, the compiler does not choose kernels by measurement where this changes bits:
    two workers must compute the same prediction for the same draft.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._compiled = torch.compile(module, **compiler_options())
        known = [name for name in LIMITS if hasattr(torch._dynamo.config, name)]
        self._unlimited = dict.fromkeys(known, sys.maxsize)
        self._seen: set[object] = set()

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        with torch.inference_mode(mode=False), torch.no_grad():
            arguments = _ordinary(x), _ordinary(t), {name: _ordinary(value) for name, value in cond.items()}
            key = _shapes(_named(x, t, cond))
            limits = contextlib.nullcontext() if key in self._seen else torch._dynamo.config.patch(self._unlimited)
            with limits:
                predicted: Tensor = self._compiled(*arguments)
            self._seen.add(key)
            return predicted


def compiler_options() -> dict[str, Any]:
    """Return the keyword arguments of torch.compile in workers: a compilation for each shape, the same in each."""
    options: dict[str, Any] = {}
    if "deterministic" in torch._inductor.list_options():  # not in older versions of torch
        options["deterministic"] = os.environ.get("TORCHINDUCTOR_DETERMINISTIC", "1") == "1"
    return {"dynamic": False, "options": options}


def _named(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {**{f"cond {name}": value for name, value in cond.items()}, "x": x, "t": t}


def _shapes(given: Mapping[str, Tensor]) -> object:
    return tuple((name, value.dtype, tuple(value.shape)) for name, value in sorted(given.items()))


def _ordinary(value: Tensor) -> Tensor:
    return value.clone() if value.is_inference() else value


class Graphs:
    """Functions of named tensors as CUDA graphs, captured at the first call with each shape and replayed afterwards.

    A function must not read values on the host, nor keep its arguments. Its results are valid until the next call of
    any function: all graphs share one memory pool, which is safe because they are replayed one after the other in one
    stream.
    """

    def __init__(self) -> None:
        self._graphs: dict[tuple[object, object], tuple[Callable[[], object], Any, dict[str, Tensor]]] = {}
        self._stream: Any = None
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def retain(self, names: Container[object]) -> None:
        """Free the graphs of functions with other names than these."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] in names}

    def __call__(
        self,
        function: Callable[[dict[str, Tensor]], T],
        given: Mapping[str, Tensor],
        restore: Callable[[], object],
        name: object = None,
    ) -> T:
        """Return the result of a function for these tensors.

        Args:
            function: called for the capture only; `name` says which it is.
            given: its argument, or tensors like it in the other calls.
            restore: undoes what the function has written, between the evaluations that precede a capture and its own.
        """
        key = name, _shapes(given)
        with torch.inference_mode(mode=False), torch.no_grad():  # Calls in either mode write to the graph's inputs.
            if key not in self._graphs:
                inputs = {each: value.clone() for each, value in given.items()}
                device = next(iter(inputs.values())).device
                self._graphs[key] = *self._capture(lambda: function(dict(inputs)), device, restore), inputs
            replay, output, inputs = self._graphs[key]
            for each, value in given.items():
                inputs[each].copy_(value)
        replay()
        return cast("T", output)

    def _capture(
        self, function: Callable[[], T], device: torch.device, restore: Callable[[], object]
    ) -> tuple[Callable[[], object], T]:
        """Return a callable that replays a function without arguments, and the tensors that it returns each time."""
        if self._stream is None:  # torch's default capture stream is on the GPU where it was used first.
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it
        if not self._graphs:  # torch fails an assertion on a pool whose graphs are all gone, as after a failed capture.
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(device):
            mine = torch.cuda.current_stream()
            self._stream.wait_stream(mine)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM):
                    function()
                    restore()
            mine.wait_stream(self._stream)
            graph: Any = torch.cuda.CUDAGraph()
            try:
                # Other threads of this program may allocate in the meantime: capture only this thread's operations.
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    output = function()
            except RuntimeError as error:
                torch.cuda.set_stream(mine)  # If the capture failed, torch leaves its own stream current.
                raise RuntimeError(
                    f"the model cannot be captured as a CUDA graph: {error}; it must not look at numbers on the host, "
                    "nor make tensors there; or leave graphs out of ExecutionOptions"
                ) from error
        return graph.replay, output


class Captured:
    """A denoiser as CUDA graphs, one for each shape. Its result is valid until the next call."""

    def __init__(self, predict: Predict, restore: Callable[[], object]) -> None:
        self._predict, self._restore, self.graphs = predict, restore, Graphs()

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.graphs(self._apply, _named(x, t, cond), self._restore)

    def _apply(self, given: dict[str, Tensor]) -> Tensor:
        x, t = given.pop("x"), given.pop("t")
        return self._predict(x, t, {name.removeprefix("cond "): value for name, value in given.items()})
