"""Program: what a pipeline asks of its modules in one step, written down so that it can be run for another state.

A program is a list of calls, in order. Each has the description of its arguments, and says of every tensor in them
where it comes from: from the draft (`input`), from what stays the same all through the pipeline's call (`cond`), or
from the results of a call before it in the same step (`output`: a ControlNet's, for the denoiser).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drp.diffusers.tree import Json, flatten, rebuild

PROGRAM = "program"
"""The condition that holds a program, as the bytes of its JSON."""


@dataclass(frozen=True)
class Leaf:
    """A tensor among the arguments: `kind` "input" or "cond" and its name, or "output", the call and the place there.

    `zeros` go before an output, so many along the batch. `stride`, if its numbers do not lie in order: bits may depend
    on it.
    """

    kind: str
    name: str = ""
    call: int = 0
    place: int = 0
    zeros: int = 0
    stride: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Call:
    """One call of the module of this name; `arguments` describes (args, kwargs), `results` how many tensors come."""

    module: str
    arguments: Json
    leaves: tuple[Leaf, ...]
    results: int


@dataclass(frozen=True)
class Program:
    """A step's calls, in order."""

    calls: tuple[Call, ...]

    def run(
        self,
        modules: Mapping[str, Callable[..., Any]],
        inputs: Mapping[str, Tensor],
        cond: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Make the calls for the draft `inputs`; write every tensor of the results into `outputs`."""
        known: dict[tuple[int, int], Tensor] = {}
        for number, call in enumerate(self.calls):
            tensors = [self._tensor(leaf, inputs, cond, known) for leaf in call.leaves]
            args, kwargs = rebuild(call.arguments, tensors)
            _, results, _ = flatten(modules[call.module](*args, **kwargs))
            if len(results) != call.results:
                raise TypeError(f"{call.module} returned {len(results)} tensors; it has returned {call.results}")
            for place, tensor in enumerate(results):
                known[number, place] = tensor
                _write(tensor, outputs[output_name(number, place)])

    def _tensor(
        self,
        leaf: Leaf,
        inputs: Mapping[str, Tensor],
        cond: Mapping[str, Tensor],
        known: Mapping[tuple[int, int], Tensor],
    ) -> Tensor:
        if leaf.kind == "output":
            return with_zeros(known[leaf.call, leaf.place], leaf.zeros)
        tensor = (inputs if leaf.kind == "input" else cond)[leaf.name]
        return tensor if leaf.stride is None else with_stride(tensor, leaf.stride)


def output_name(call: int, place: int) -> str:
    """Return the name of a result in a slot."""
    return f"{call}.{place}"


def with_zeros(tensor: Tensor, count: int) -> Tensor:
    """Return a tensor with so many samples of zeros before it."""
    return torch.cat([torch.zeros_like(tensor[:1]).expand(count, *tensor.shape[1:]), tensor]) if count else tensor


def stride_of(tensor: Tensor) -> tuple[int, ...] | None:
    """Return a tensor's stride, None if its numbers lie in order."""
    return None if tensor.is_contiguous() else tuple(tensor.stride())


def with_stride(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """Return a contiguous tensor's numbers laid out with a stride; what is repeated by a stride of 0 is once there."""
    once = tensor[tuple(slice(0, 1) if s == 0 else slice(None) for s in stride)]
    laid = torch.empty_strided(once.shape, tuple(stride), dtype=tensor.dtype)
    return laid.copy_(once).expand(tensor.shape)


def _write(tensor: Tensor, out: Tensor) -> None:
    if tensor.shape != out.shape or tensor.dtype != out.dtype:
        raise TypeError(
            f"a module returned {tensor.dtype} {list(tensor.shape)}; it has returned {out.dtype} {list(out.shape)}"
        )
    out.copy_(tensor)


def to_tensor(program: Program, sources: Mapping[str, Json]) -> Tensor:
    """Return a program and where its modules are found, as a condition."""
    fields = {
        "calls": [
            {"module": c.module, "arguments": c.arguments, "leaves": [vars(x) for x in c.leaves], "results": c.results}
            for c in program.calls
        ],
        "modules": dict(sources),
    }
    return torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8)


def from_bytes(text: bytes) -> tuple[Program, dict[str, Json]]:
    """Return the program and the sources of its modules that `to_tensor` wrote down."""
    fields = json.loads(text)
    calls = tuple(
        Call(c["module"], c["arguments"], tuple(Leaf(**leaf) for leaf in c["leaves"]), c["results"])
        for c in fields["calls"]
    )
    return Program(calls), fields["modules"]
