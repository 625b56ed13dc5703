"""The program of a step: the calls that a pipeline makes of its modules, which can be repeated for another state.

A program is a list of calls, in order. Each has a description of its arguments, and for every tensor in them its
source: the draft (`input`), a constant of the pipeline's call (`cond`), or a result of an earlier call in the same step
(`output`, such as that of a ControlNet for the denoiser).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from drp.diffusers.pytree import Json, flatten, rebuild
from drp.diffusers.settings import applied

PROGRAM = "program"
"""The name of the condition that has a program, as the bytes of its JSON."""
PART = "part"
"""The name of the draft's tensor that selects the part of a program to run, if it has several."""


@dataclass(frozen=True)
class Leaf:
    """The source of a tensor among the arguments.

    kind: "input" or "cond", with a name, or "output", with a call and the position among its results.
    zeros: the number of samples of zeros before an output, along the batch.
    stride: the stride, if the tensor is not contiguous, since bits may depend on it.
    on_host: whether the tensor is on the host although the pipeline is on a GPU.
    """

    kind: str
    name: str = ""
    call: int = 0
    place: int = 0
    zeros: int = 0
    stride: tuple[int, ...] | None = None
    on_host: bool = False


@dataclass(frozen=True)
class Call:
    """A call of a module by name. `arguments` describes (args, kwargs), `results` what it returns."""

    module: str
    arguments: Json
    leaves: tuple[Leaf, ...]
    results: Json


@dataclass(frozen=True)
class Program:
    """A step's calls, in order.

    parts, batch: the number of parts that can run on different devices: shares of a doubled batch of `batch` samples,
        or single calls.
    settings: the settings of torch and diffusers with which it runs, None for the current ones.
    samples: if not 0, the program can run for several drafts, with tensors of this many samples stacked.
    """

    calls: tuple[Call, ...]
    parts: int = 1
    batch: int = 0
    settings: Json = None
    samples: int = 0

    def stacked(self, sizes: Collection[int]) -> Program | None:
        """Return the program for several drafts at once, None if they cannot be stacked.

        `sizes` are the sizes of the batches that contain the latents.
        """
        zeros = any(leaf.zeros for call in self.calls for leaf in call.leaves)
        return None if len(sizes) != 1 or zeros or self.parts > 1 else replace(self, samples=next(iter(sizes)))

    def in_branches(self, sizes: Collection[int]) -> Program | None:
        """Return the program in parts, one for each branch of guidance, None if it has no known branches.

        `sizes` are the sizes of the batches that contain the latents twice.
        """
        among = [leaf for call in self.calls for leaf in call.leaves if leaf.kind == "output"]
        if len(self.calls) > 1 and not among:
            return replace(self, parts=len(self.calls))
        if len(sizes) != 1 or any(leaf.zeros for leaf in among):
            return None
        return replace(self, parts=2, batch=next(iter(sizes)))

    @property
    def can_be_captured(self) -> bool:
        """Whether it can be captured as a CUDA graph: it has calls, and they read no number on the host."""
        on_host = any(leaf.on_host for call in self.calls for leaf in call.leaves)
        return bool(self.calls) and self.parts == 1 and not on_host

    def merge(self, outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return all results, as views or copies, given the results of each part."""
        merged = dict(outputs[0])
        for name in merged if self.parts > 1 else ():
            if not self.batch:
                merged[name] = outputs[int(name.partition(".")[0])][name]
            elif len(merged[name]) == self.batch:
                merged[name] = torch.cat([self._own(part[name], i) for i, part in enumerate(outputs)])
        return merged

    def _own(self, tensor: Tensor, part: int) -> Tensor:
        """Return a part's share of a tensor's samples, or the tensor if it does not consist of samples."""
        halved = self.batch and tensor.dim() > 0 and len(tensor) == self.batch
        return tensor.chunk(self.parts)[part] if halved else tensor

    def run(
        self,
        modules: Mapping[str, Callable[..., Any]],
        inputs: Mapping[str, Tensor],
        cond: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Make the calls for the draft `inputs`; write the results to `outputs`."""
        with applied(self.settings) if self.settings is not None else nullcontext():
            self._run(modules, inputs, cond, outputs)

    def run_batch(
        self,
        modules: Mapping[str, Callable[..., Any]],
        inputs: Sequence[Mapping[str, Tensor]],
        cond: Mapping[str, Tensor],
        outputs: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Make the calls for several drafts at once; write the results of each to its `outputs`."""
        if not self.samples or len(inputs) == 1:
            for each, out in zip(inputs, outputs, strict=True):
                self.run(modules, each, cond, out)
            return
        known: dict[tuple[int, int], Tensor] = {}
        with applied(self.settings) if self.settings is not None else nullcontext():
            for number, call in enumerate(self.calls):
                tensors = [self._stack(leaf, inputs, cond, known) for leaf in call.leaves]
                for place, tensor in enumerate(_results_of(call, modules, tensors)):
                    known[number, place] = tensor
                    for part, out in zip(tensor.chunk(len(inputs)), outputs, strict=True):
                        write(part, out[output_name(number, place)])

    def _stack(
        self,
        leaf: Leaf,
        inputs: Sequence[Mapping[str, Tensor]],
        cond: Mapping[str, Tensor],
        known: Mapping[tuple[int, int], Tensor],
    ) -> Tensor:
        """Return an argument for several drafts: their concatenated samples, or the value that they share."""
        if leaf.kind == "output":
            return known[leaf.call, leaf.place]
        if leaf.kind == "input" and inputs[0][leaf.name].dim() == 0:
            # On the drafts' device even if `on_host`: a module takes a single number from the host, but no others.
            return torch.stack([draft[leaf.name] for draft in inputs]).repeat_interleave(self.samples)
        each = [self._tensor(leaf, draft, cond, {}, 0) for draft in inputs]
        if leaf.kind == "input" or (each[0].dim() > 0 and len(each[0]) == self.samples):
            return torch.cat(each)
        return each[0]

    def _run(
        self,
        modules: Mapping[str, Callable[..., Any]],
        inputs: Mapping[str, Tensor],
        cond: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> None:
        known: dict[tuple[int, int], Tensor] = {}
        part = int(inputs[PART]) if self.parts > 1 else 0
        for number, call in enumerate(self.calls):
            if self.parts > 1 and not self.batch and number != part:
                continue
            tensors = [self._tensor(leaf, inputs, cond, known, part) for leaf in call.leaves]
            for place, tensor in enumerate(_results_of(call, modules, tensors)):
                known[number, place] = tensor
                write(tensor, self._own(outputs[output_name(number, place)], part))

    def _tensor(
        self,
        leaf: Leaf,
        inputs: Mapping[str, Tensor],
        cond: Mapping[str, Tensor],
        known: Mapping[tuple[int, int], Tensor],
        part: int,
    ) -> Tensor:
        if leaf.kind == "output":
            return with_zeros(known[leaf.call, leaf.place], leaf.zeros)
        tensor = (inputs if leaf.kind == "input" else cond)[leaf.name]
        if leaf.on_host:
            tensor = tensor.cpu()
        # Always a copy, since a module may write to its arguments.
        return self._own(tensor.clone() if leaf.stride is None else with_stride(tensor, leaf.stride), part)


def _results_of(call: Call, modules: Mapping[str, Callable[..., Any]], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Make a call with these tensors; return those in its result, whose other values must be as described."""
    args, kwargs = rebuild(call.arguments, tensors)
    description, results, _ = flatten(modules[call.module](*args, **kwargs))
    if description != call.results:
        raise TypeError(
            f"{call.module} returned {description}; it has returned {call.results}. Values that differ from one "
            "evaluation to the next must be tensors"
        )
    return results


def output_name(call: int, place: int) -> str:
    """Return the name of a result in a slot."""
    return f"{call}.{place}"


def with_zeros(tensor: Tensor, count: int) -> Tensor:
    """Return a tensor with `zeros` samples of zeros before it."""
    return torch.cat([torch.zeros_like(tensor[:1]).expand(count, *tensor.shape[1:]), tensor]) if count else tensor


def stride_of(tensor: Tensor) -> tuple[int, ...] | None:
    """Return a tensor's stride, None if it is contiguous."""
    return None if tensor.is_contiguous() else tuple(tensor.stride())


def with_stride(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """Return a copy of a contiguous tensor with a stride. Dimensions of stride 0 take memory once."""
    once = tensor[tuple(slice(0, 1) if s == 0 else slice(None) for s in stride)]
    laid = torch.empty_strided(once.shape, tuple(stride), dtype=tensor.dtype, device=tensor.device)
    return laid.copy_(once).expand(tensor.shape)


def write(tensor: Tensor, out: Tensor) -> None:
    """Write a result, or a part of it, to its place; raise TypeError unless it has the place's shape and dtype."""
    if tensor.shape != out.shape or tensor.dtype != out.dtype:
        raise TypeError(
            f"a module returned {tensor.dtype} {list(tensor.shape)}; it has returned {out.dtype} {list(out.shape)}"
        )
    with torch.inference_mode(out.is_inference()):
        out.copy_(tensor)


def to_tensor(program: Program, sources: Mapping[str, Json]) -> Tensor:
    """Encode a program and the sources of its modules as a condition."""
    fields = {
        "calls": [
            {"module": c.module, "arguments": c.arguments, "leaves": [vars(x) for x in c.leaves], "results": c.results}
            for c in program.calls
        ],
        "parts": program.parts,
        "batch": program.batch,
        "settings": program.settings,
        "samples": program.samples,
        "modules": dict(sources),
    }
    return torch.frombuffer(bytearray(json.dumps(fields).encode()), dtype=torch.uint8)


def from_bytes(text: bytes) -> tuple[Program, dict[str, Json]]:
    """Decode a program and the sources of its modules; the inverse of `to_tensor`."""
    fields = json.loads(text)
    calls = tuple(
        Call(c["module"], c["arguments"], tuple(Leaf(**leaf) for leaf in c["leaves"]), c["results"])
        for c in fields["calls"]
    )
    program = Program(calls, fields["parts"], fields["batch"], fields["settings"], fields["samples"])
    return program, fields["modules"]
