"""Worker: what the worker processes load in place of a model: it runs programs, on modules that it makes as told."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drp.diffusers.program import PROGRAM, Program, from_bytes
from drp.diffusers.pytree import Json
from drp.diffusers.structure import make
from drp.models.state import ModuleState
from drp.protocol.handles import Handle
from drp.protocol.memory import DTYPES, SharedMemory

KEPT = 8
"""Programs kept, and modules."""


class Programs:
    """Runs the program that a run's conditions hold."""

    def __init__(self) -> None:
        self._programs: dict[bytes, tuple[Program, dict[str, nn.Module], ModuleState]] = {}
        self._modules: dict[int, nn.Module] = {}

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Refuse: a program's drafts are more than a state."""
        raise TypeError("this model runs the programs of drp.diffusers, and nothing else")

    def fill(
        self,
        inputs: Mapping[str, Tensor],
        timestep: float,
        cond: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Write the program's results for a draft into `outputs`."""
        program, modules, state = self._program(bytes(cond[PROGRAM].numpy()))
        try:
            program.run(modules, inputs, cond, outputs)
        finally:
            state.restore()

    def _program(self, text: bytes) -> tuple[Program, dict[str, nn.Module], ModuleState]:
        if text not in self._programs:
            program, sources = from_bytes(text)
            modules = {name: self._module(source) for name, source in sources.items()}
            self._programs[text] = program, modules, ModuleState(*modules.values())
            _forget(self._programs)
        return self._programs[text]

    def _module(self, source: Json) -> nn.Module:
        number = source["number"]
        if number not in self._modules:
            memory = SharedMemory.open(Handle(**source["memory"]))
            fields = json.loads(memory.read()[: source["length"]])
            memory.close()
            with torch.inference_mode(False):  # Weights made in that mode are tensors of another kind.
                self._modules[number] = make(fields["structure"], _weights(fields["weights"]))
            _forget(self._modules)
        return self._modules[number]


def load() -> Programs:
    """Return it: the model `drp.diffusers.worker:load`. Importing diffusers takes seconds: they belong to the start."""
    importlib.import_module("diffusers.models.unets")
    return Programs()


def _weights(places: Json) -> list[Tensor]:
    """Return tensors where they are published; what this process writes to them nobody else sees."""
    blocks: dict[str, SharedMemory] = {}
    tensors = []
    for place in places:
        key = json.dumps(place["memory"])
        if key not in blocks:
            blocks[key] = SharedMemory.open(Handle(**place["memory"]), private=True)
        block = blocks[key]
        shape, stride = place["shape"], place["stride"]
        count = 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        flat = block.tensor(place["offset"], (count,), DTYPES[place["dtype"]]).view(getattr(torch, place["view"]))
        tensors.append(flat.as_strided(shape, stride) if count else flat.view(shape))
    for block in blocks.values():
        block.close()
    return tensors


def _forget(known: dict[Any, Any]) -> None:
    while len(known) > KEPT:
        del known[next(iter(known))]
