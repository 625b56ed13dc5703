"""The model that workers of pipelines load. It runs programs on modules that it rebuilds or loads."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from drp.diffusers.features import casts_of
from drp.diffusers.program import PROGRAM, Program, from_bytes, write
from drp.diffusers.pytree import Json
from drp.diffusers.sources import Block, TensorLocation, load_signed
from drp.diffusers.structure import Described, describe, make
from drp.frozen_imports import frozen_imports
from drp.models.gpu import Graphs
from drp.models.state import ModuleState
from drp.protocol.handles import GpuHandle, Handle
from drp.protocol.memory import LocalMemory, Memory, SharedMemory
from drp.protocol.messages import GpuConfig

KEPT = 8
"""The maximum number of cached programs and modules."""


class WorkerGpu(Protocol):
    """A worker's GPU, see `drp.workers.cuda_device`."""

    device: torch.device
    config: GpuConfig

    def open_ipc(self, handle: GpuHandle) -> Memory:
        """Open memory of another process on this GPU."""
        ...


class ChangeDetector:
    """Detects that an evaluation changes modules: the next ones would depend on it, and the leader would not see it.

    The first evaluation of each number of drafts, in `counts`, may change them, for example to fill a cache. Modules
    with layerwise casting, which moves the weights at each evaluation, are left out: comparing these takes too long.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = {
            name: module
            for name, module in modules.items()
            if not any(casts_of(each, name) for each in module.modules())
        }
        self._described: dict[str, Described] = {}
        self.counts: set[int] = set()

    def restart(self) -> None:
        """Have the next call of `check` accept the modules as they are."""
        self._described.clear()

    def check(self) -> None:
        """Raise RuntimeError if a module has changed since the last call of this method."""
        if not self._described:
            self._described = {name: describe(module) for name, module in self._modules.items()}
        for name, module in self._modules.items():
            if not self._described[name].follow(partial(describe, module)):
                raise RuntimeError(
                    f"{name} itself was changed by an evaluation: it has begun to count, or to keep something of its "
                    "arguments, which would stay in workers"
                )


@dataclass(frozen=True)
class LoadedProgram:
    """A program with the modules that it calls."""

    program: Program
    modules: dict[str, nn.Module]
    state: ModuleState
    changes: ChangeDetector


class Programs:
    """Runs the program in the conditions of a run."""

    def __init__(self) -> None:
        self._gpu: WorkerGpu | None = None
        self._loads_pretrained = False
        self._texts: dict[int, tuple[Tensor, bytes]] = {}
        self._programs: dict[bytes, LoadedProgram] = {}
        self._modules: dict[int, tuple[nn.Module, set[int]]] = {}
        """Modules and the numbers of their blocks, by number."""
        self._loaded: dict[str, nn.Module] = {}
        """Modules that this process has loaded itself, by their descriptions."""
        self._uploads: dict[int, tuple[int, LocalMemory]] = {}
        """The version and the copy of blocks on the host, by number, for a GPU without shared memory."""
        self._graphs: Graphs | None = None

    def use_gpu(self, gpu: WorkerGpu) -> None:
        """Run on this GPU from now on, with CUDA graphs if it is configured so."""
        self._gpu = gpu
        self._graphs = Graphs() if gpu.config.graphs else None

    def use_pretrained(self) -> None:
        """Load modules here from now on: the leader is on another machine."""
        self._loads_pretrained = True

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Raise an error: the drafts of programs have several tensors, see `fill`."""
        raise TypeError("this model runs the programs of drp.diffusers, and nothing else")

    def fill(
        self,
        inputs: Mapping[str, Tensor],
        timestep: float,
        cond: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Write the program's results for a draft to `outputs`."""
        self.fill_batch([inputs], cond, [outputs])

    def fill_batch(
        self,
        inputs: Sequence[Mapping[str, Tensor]],
        cond: Mapping[str, Tensor],
        outputs: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Write the program's results for several drafts to their `outputs`."""
        text = self._text(cond[PROGRAM])
        loaded = self._program(text)
        try:
            # Compiled code and cached values of modules must not contain inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                if self._graphs is not None and loaded.program.can_be_captured:
                    self._replay(self._graphs, text, inputs, cond, outputs)
                else:
                    self._run(loaded, inputs, cond, outputs)
        except BaseException:  # The modules may have been changed: load them again.
            for known in (self._programs, self._modules, self._loaded):
                known.clear()
            if self._graphs is not None:
                self._graphs.retain(())  # They read the buffers of the modules that are gone.
            raise
        finally:
            loaded.state.restore()

    def _run(
        self,
        loaded: LoadedProgram,
        inputs: Sequence[Mapping[str, Tensor]],
        cond: Mapping[str, Tensor],
        outputs: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Run `fill_batch` by the modules' own code, which may change them; a replayed graph does not run it."""
        loaded.program.run_batch(loaded.modules, inputs, cond, outputs)
        if len(inputs) not in loaded.changes.counts:
            loaded.changes.counts.add(len(inputs))
            for each in self._programs.values():  # Programs may share modules.
                each.changes.restart()
        loaded.changes.check()

    def _replay(
        self,
        graphs: Graphs,
        text: bytes,
        inputs: Sequence[Mapping[str, Tensor]],
        cond: Mapping[str, Tensor],
        outputs: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """Run `fill_batch` as a CUDA graph, whose arguments are copies of the drafts and conditions."""
        loaded = self._programs[text]
        drafts = [{name: f"draft {number} {name}" for name in draft} for number, draft in enumerate(inputs)]
        conditions = {name: f"cond {name}" for name in cond if name != PROGRAM}

        def run(given: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
            made = [{name: torch.empty_like(out) for name, out in each.items()} for each in outputs]
            own = [{name: given[place] for name, place in draft.items()} for draft in drafts]
            loaded.program.run_batch(
                loaded.modules, own, {name: given[place] for name, place in conditions.items()}, made
            )
            return made

        given = {place: cond[name] for name, place in conditions.items()}
        for draft, names in zip(inputs, drafts, strict=True):
            given.update((place, draft[name]) for name, place in names.items())
        for each, made in zip(outputs, graphs(run, given, loaded.state.restore, text), strict=True):
            for name, out in each.items():
                write(made[name], out)

    def _text(self, program: Tensor) -> bytes:
        """Return a condition's bytes, which are fetched from the GPU once per run."""
        if id(program) not in self._texts:
            self._texts[id(program)] = program, bytes(program.cpu().numpy())
            _forget(self._texts)
        return self._texts[id(program)][1]

    def _program(self, text: bytes) -> LoadedProgram:
        if text not in self._programs:
            program, sources = from_bytes(text)
            find = self._load if self._loads_pretrained else self._module
            modules = {name: find(source) for name, source in sources.items()}
            state, changes = ModuleState(*modules.values()), ChangeDetector(modules)
            self._programs[text] = LoadedProgram(program, modules, state, changes)
            _forget(self._programs)
            if self._graphs is not None:
                self._graphs.retain(self._programs)
        return self._programs[text]

    def _load(self, json: Json) -> nn.Module:
        """Load a module on this machine, or return the loaded one if it matches."""
        from drp.diffusers import pretrained  # Imported here: workers on the leader's machine do not need it.

        source = json["pretrained"]
        key = str(source)
        if key not in self._loaded:
            with torch.inference_mode(False):
                module = pretrained.load(source)
                self._loaded[key] = module if self._gpu is None else module.to(self._gpu.device)
            _forget(self._loaded)
        return self._loaded[key]

    def _module(self, json: Json) -> nn.Module:
        number = json["number"]
        if number not in self._modules:
            memory = SharedMemory.open(Handle(**json["memory"]))
            source = load_signed(memory.read()[: json["length"]])
            memory.close()
            with torch.inference_mode(False):  # Weights must not be inference tensors.
                private, *weights = source.blocks
                blocks = [_on_host(private), *map(self._open, weights)]
                tensors = [self._tensor(place, blocks[place.block]) for place in source.places]
                module = make(source.pickled, tensors)
            for block in blocks:
                if isinstance(block, SharedMemory):
                    block.close()
            self._modules[number] = module, {block.number for block in weights}
            _forget(self._modules)
            used = set().union(*(numbers for _, numbers in self._modules.values()))
            self._uploads = {block: copy for block, copy in self._uploads.items() if block in used}
        return self._modules[number][0]

    def _open(self, block: Block) -> Memory | None:
        """Return the memory of a block of weights: on this worker's GPU, or on the host."""
        if self._gpu is None:
            return _on_host(block)
        if (handle := block.gpus.get(self._gpu.config.device)) is not None:
            return self._gpu.open_ipc(handle)
        shared = _on_host(block)
        assert shared is not None
        version, copy = self._uploads.get(block.number, (-1, None))
        if copy is None:
            copy = LocalMemory(shared.nbytes, self._gpu.device)
        if version != block.version:
            copy.bytes.copy_(shared.tensor(0, (shared.nbytes,), torch.uint8))
            self._uploads[block.number] = block.version, copy
        shared.close()
        return copy

    def _tensor(self, place: TensorLocation, memory: Memory | None) -> Tensor:
        """Return a tensor on the device where it is used."""
        assert memory is not None
        if self._gpu is None or place.on_host:
            return place.of(memory)
        return place.of(memory).to(self._gpu.device, copy=place.private)


def _on_host(block: Block) -> SharedMemory | None:
    """Open a block on the host, copy-on-write: writes of this process are private."""
    return SharedMemory.open(block.host, private=True) if block.host is not None else None


def load() -> Programs:
    """Return the model `drp.diffusers.worker:load`, and import diffusers, which takes seconds, at the start."""
    with frozen_imports():
        importlib.import_module("diffusers.models.unets")
    return Programs()


def _forget(known: dict[Any, Any]) -> None:
    while len(known) > KEPT:
        del known[next(iter(known))]
