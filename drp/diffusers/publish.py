"""Publish: modules, put where workers find them: descriptions and weights in shared memory, one copy for all.

The weights *move* there: the pipeline's own parameters use the same pages from then on, in this process too, also after
the workers have ended. So there is one copy on the machine, and what is later done to a weight in place (a LoRA fused
into it, say) is what the workers see.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from drp.diffusers.pytree import Json
from drp.diffusers.structure import Described, equal_bits
from drp.protocol.memory import NAMES, SharedMemory, aligned

_numbers = itertools.count(1)


MOST = 2**30
"""Bytes of weights that are moved at once."""

Key = tuple[int, tuple[int, ...], torch.dtype, tuple[int, ...]]
"""Where a tensor lies, its shape, dtype and stride."""


class Publisher:
    """The shared memory of one pipeline's modules."""

    def __init__(self) -> None:
        self._blocks: list[SharedMemory] = []
        self._places: dict[Key, Json] = {}
        self._copies: dict[str, tuple[SharedMemory | None, dict[int, tuple[Tensor, Json]]]] = {}
        self._latest: dict[str, tuple[Json, Json, SharedMemory | None]] = {}

    def publish(self, name: str, module: nn.Module, described: Described) -> Json:
        """Return the JSON by which a worker finds a module; the same as the last time if nothing has changed since."""
        description, tensors = described.json, described.tensors
        weights = {id(tensor) for tensor in module.parameters()}
        self._move([tensor for tensor in tensors if id(tensor) in weights])
        copies = self._copy(name, {i: tensor for i, tensor in enumerate(tensors) if id(tensor) not in weights})
        places = [copies[i] if i in copies else self._places[_key(tensor)] for i, tensor in enumerate(tensors)]
        known, source, old = self._latest.get(name, (None, None, None))
        if known != (description, places):
            text = json.dumps({"structure": description, "weights": places}).encode()
            memory = self._block(len(text))
            memory.tensor(0, (len(text),), torch.uint8).copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
            source = {"number": next(_numbers), "length": len(text), "memory": _fields(memory)}
            self._latest[name] = ((description, places), source, memory)
            if old is not None:
                self._blocks.remove(old)
                old.close()
        described.note_pointers()
        return source

    def _move(self, weights: Sequence[Tensor]) -> None:
        """Move the weights that are not there yet, some at a time, so that few are there twice meanwhile."""
        fresh: dict[Key, list[Tensor]] = {}
        for tensor in weights:
            if _key(tensor) not in self._places:
                fresh.setdefault(_key(tensor), []).append(tensor)  # Tied weights are one.
        for group in _groups(list(fresh.values())):
            for (shared, place), same in zip(self._fill([same[0] for same in group]), group, strict=True):
                for tensor in same:
                    tensor.data = shared
                self._places[_key(shared)] = place

    def _copy(self, name: str, tensors: Mapping[int, Tensor]) -> dict[int, Json]:
        """Return where copies are of tensors that a module may write to: buffers, and attributes that it computes."""
        block, known = self._copies.get(name, (None, {}))
        if known.keys() != tensors.keys() or not all(_equal(known[i][0], tensor) for i, tensor in tensors.items()):
            known = dict(zip(tensors, self._fill(list(tensors.values())), strict=True))
            self._copies[name] = self._blocks[-1] if tensors else None, known
            if block is not None:  # The rounds that used it are over. The new one has another descriptor.
                self._blocks.remove(block)
                block.close()
        return {i: place for i, (_, place) in known.items()}

    def _fill(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, Json]]:
        """Copy tensors into one more block; return the copies, and where they are."""
        if not tensors:
            return []
        sizes = [_count(tensor) * tensor.element_size() for tensor in tensors]
        block, offset = self._block(sum(map(aligned, sizes))), 0
        filled = []
        for tensor, size in zip(tensors, sizes, strict=True):
            # Messages never name the dtypes of 8 bits that weights may be stored in, so the protocol has none.
            known = tensor.dtype if tensor.dtype in NAMES else torch.uint8
            flat = block.tensor(offset, (_count(tensor),), known).view(tensor.dtype)
            shape, stride = list(tensor.shape), list(tensor.stride())
            shared = flat.as_strided(shape, stride) if len(flat) else flat.view(shape)
            shared.copy_(tensor.detach())
            place = {"memory": _fields(block), "offset": offset, "dtype": NAMES[known]}
            view = str(tensor.dtype).removeprefix("torch.")
            filled.append((shared, {**place, "view": view, "shape": shape, "stride": stride}))
            offset += aligned(size)
        return filled

    def _block(self, nbytes: int) -> SharedMemory:
        self._blocks.append(SharedMemory.create(nbytes))
        return self._blocks[-1]

    def close(self) -> None:
        """Give the descriptors back: nobody can open the memory any more; the pipeline's weights stay in it."""
        self._copies.clear()
        for block in self._blocks:
            block.close()
        self._blocks.clear()


def _groups(weights: Sequence[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Yield weights in groups of about `MOST` bytes, in order."""
    group: list[list[Tensor]] = []
    nbytes = 0
    for same in weights:
        if group and nbytes + same[0].nbytes > MOST:
            yield group
            group, nbytes = [], 0
        group.append(same)
        nbytes += same[0].nbytes
    if group:
        yield group


def _key(tensor: Tensor) -> Key:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype, tuple(tensor.stride())


def _equal(copy: Tensor, tensor: Tensor) -> bool:
    return _key(copy)[1:] == _key(tensor)[1:] and equal_bits(copy, tensor)


def _count(tensor: Tensor) -> int:
    """Return how many numbers the memory has that a tensor lies in."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0


def _fields(memory: SharedMemory) -> dict[str, int]:
    handle = memory.handle
    return {"pid": handle.pid, "fd": handle.fd, "nbytes": handle.nbytes}
