"""Publication of modules to workers: pickles in host memory, and weights in shared memory.

The weights are moved there: the pipeline's own parameters use the shared memory from then on, also after the workers
have ended. On the host there is thus one copy of the weights, and workers see later in-place changes, such as a fused
LoRA. On GPUs there is one copy on each, allocated by this process: workers on the pipeline's GPU use the pipeline's own
weights, and the copies on other GPUs are updated when those change.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from drp.diffusers.pytree import Json, UnknownValueError
from drp.diffusers.sources import Block, ModuleSource, TensorLocation, dump_signed
from drp.diffusers.structure import Described, equal_bits, plain_tensors
from drp.errors import CudaError
from drp.models.gpu import synchronize
from drp.protocol.cuda import GpuMemory
from drp.protocol.memory import ALIGNMENT, LocalMemory, Memory, SharedMemory, aligned

_numbers = itertools.count(1)

MAX_BLOCK_NBYTES = 2**28
"""Maximum number of bytes of weights that are moved at once, for which memory is needed twice."""
ROW = 32
"""The length of a fingerprint's row in words of 8 bytes; blocks consist of whole rows."""

log = logging.getLogger(__name__)

Key = tuple[int, tuple[int, ...], torch.dtype, tuple[int, ...]]
"""A tensor's address, shape, dtype and stride."""


@dataclass
class GpuWeights:
    """The GPUs that need copies of the weights, by UUID.

    home: the GPU of the pipeline.
    others: the other GPUs of the workers.
    ipc: whether processes can share GPU memory on this machine. Otherwise workers copy weights from the host.
    exported: the exported memory, which must not be freed before the workers have ended.
    places: the places of weights that earlier publishers have moved.
    """

    home: str
    others: tuple[str, ...]
    ipc: bool
    exported: list[GpuMemory] = field(default_factory=list)
    places: dict[Key, tuple[_Weights, TensorLocation]] = field(default_factory=dict)

    def create(self, nbytes: int, gpu: str) -> GpuMemory:
        """Allocate memory that is freed when it is closed and unused; raise MemoryError or CudaError if that fails."""
        memory = GpuMemory.create(nbytes, gpu, GpuMemory.free_with_tensors)
        self.exported.append(memory)
        return memory

    def discard(self, memory: GpuMemory) -> None:
        """Free memory that no worker has opened."""
        self.exported.remove(memory)
        memory.close()

    def close(self) -> None:
        """Free the memory once no pipeline's weights are in it. The workers must have ended."""
        self.places.clear()
        while self.exported:
            self.exported.pop().close()


@dataclass(eq=False)
class _Weights:
    """A block of the pipeline's weights, with its copies on other GPUs or on the host."""

    memory: Memory
    copies: list[Memory]
    block: Block
    fingerprint: tuple[int, ...] = ()

    def follow(self) -> bool:
        """Update the copies if the weights were changed in place; return whether they were."""
        if not self.copies:
            return False
        flat = self.memory.tensor(0, (self.memory.nbytes,), torch.uint8)
        now = fingerprint(flat)
        if now == self.fingerprint:
            return False
        for copy in self.copies:
            copy.tensor(0, (self.memory.nbytes,), torch.uint8).copy_(flat)
            synchronize(copy.device)
        self.fingerprint = now
        if self.block.host is not None:
            self.block = replace(self.block, version=self.block.version + 1)
        return True


@dataclass
class _Copies:
    """Copies on the host of tensors that a module may write to. `known` are their values on the pipeline's device."""

    memory: SharedMemory | None
    block: Block
    known: dict[int, Tensor]
    places: dict[int, TensorLocation]


class Publisher:
    """The shared memory of one pipeline's modules. `gpus` are the GPUs that need the weights, None for the host."""

    def __init__(self, gpus: GpuWeights | None = None) -> None:
        self._gpus = gpus
        self._host: list[SharedMemory] = []
        self._places: dict[Key, tuple[_Weights, TensorLocation]] = {} if gpus is None else gpus.places
        self._copies: dict[str, _Copies] = {}
        self._latest: dict[str, tuple[ModuleSource, Json, SharedMemory]] = {}

    def publish(self, name: str, described: Described) -> Json:
        """Return the JSON by which a worker finds a module, the previous one if nothing has changed."""
        tensors = described.tensors
        home = self._home_of(name, tensors)
        shared = {i for i, t in enumerate(tensors) if described.is_weight[i] and (home is None or t.device == home)}
        with described.moving():
            self._move([tensors[i] for i in sorted(shared)])
        copies = self._copy(name, {i: t for i, t in enumerate(tensors) if i not in shared}, home)
        used: list[_Weights] = []
        places = []
        for i, tensor in enumerate(tensors):
            if i in shared:
                weights, place = self._places[_key(tensor)]
                if weights not in used:
                    used.append(weights)
                places.append(replace(place, block=1 + used.index(weights)))
            else:
                places.append(copies.places[i])
        for weights in used:
            weights.follow()
        source = ModuleSource(described.pickled, (copies.block, *(weights.block for weights in used)), tuple(places))
        return self._json(name, source)

    def _json(self, name: str, source: ModuleSource) -> Json:
        known, json, old = self._latest.get(name, (None, None, None))
        if known == source:
            return json
        data = dump_signed(source)
        memory = self._on_host(len(data))
        memory.tensor(0, (len(data),), torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        handle = memory.handle
        place = {"pid": handle.pid, "fd": handle.fd, "nbytes": handle.nbytes}
        json = {"number": next(_numbers), "length": len(data), "memory": place}
        self._latest[name] = source, json, memory
        if old is not None:
            self._close(old)
        return json

    def _home_of(self, name: str, tensors: Sequence[Tensor]) -> torch.device | None:
        """Return the GPU that a module is on, None for the host; raise UnknownValueError if it is on several."""
        devices = sorted({str(tensor.device) for tensor in tensors if tensor.device.type != "cpu"})
        if len(devices) > 1:
            raise UnknownValueError(f"{name} is spread over {', '.join(devices)}; drp takes a module on one GPU")
        return torch.device(devices[0]) if devices else None

    def _move(self, weights: Sequence[Tensor]) -> None:
        """Move the weights that are not in shared memory yet, in groups, so that few need memory twice."""
        fresh: dict[Key, list[Tensor]] = {}
        for tensor in weights:
            if _key(tensor) not in self._places:
                fresh.setdefault(_key(tensor), []).append(tensor)  # Tied weights are moved once.
        for group in _groups(list(fresh.values())):
            places, nbytes = _lay_out([same[0] for same in group], private=False)
            device = group[0][0].device
            block = self._create(max(nbytes, ALIGNMENT), device)
            if block.memory.device != device:
                raise UnknownValueError(
                    f"a weight is on {device}, the pipeline on {block.memory.device}; move it there"
                )
            for same, place in zip(group, places, strict=True):
                moved = place.of(block.memory)
                with plain_tensors():
                    moved.copy_(same[0].detach())
                    for tensor in same:
                        tensor.data = moved
                self._places[_key(moved)] = block, place
            synchronize(device)  # Workers read them on streams of their own.
            block.follow()
        if fresh and self._gpus is not None and self._gpus.ipc:
            free_cached()

    def _create(self, nbytes: int, device: torch.device) -> _Weights:
        if self._gpus is None:
            shared = self._on_host(nbytes)
            return _Weights(shared, [], Block(next(_numbers), {}, shared.handle))
        made: dict[str, GpuMemory] = {}
        for gpu in (self._gpus.home, *self._gpus.others) if self._gpus.ipc else ():
            try:
                made[gpu] = self._gpus.create(nbytes, gpu)
            except CudaError as error:
                log.warning("weights are copied from the host by each worker on %s: %s", gpu, error)
            except MemoryError:  # Without this, each call of the pipeline would take more memory of the other GPUs.
                for memory in made.values():
                    self._gpus.discard(memory)
                raise
        handles = {gpu: handle for gpu, memory in made.items() if (handle := memory.ipc_handles[1]) is not None}
        home = made.pop(self._gpus.home, None) or LocalMemory(nbytes, device)
        copies: list[Memory] = [*made.values()]
        host = None
        if len(handles) <= len(self._gpus.others):
            mirror = self._on_host(nbytes)
            host = mirror.handle
            copies.append(mirror)
        return _Weights(home, copies, Block(next(_numbers), handles, host))

    def _copy(self, name: str, tensors: Mapping[int, Tensor], home: torch.device | None) -> _Copies:
        """Return the places of the copies of tensors that a module may write to: buffers and computed attributes."""
        latest = self._copies.get(name)
        same = latest is not None and latest.known.keys() == tensors.keys()
        if latest is not None and same and all(_equal(latest.known[i], tensor) for i, tensor in tensors.items()):
            return latest
        places, nbytes = _lay_out(list(tensors.values()), private=True, home=home)
        memory = self._on_host(nbytes) if tensors else None
        block = Block(next(_numbers), {}, memory.handle if memory else None)
        copies = _Copies(memory, block, {}, dict(zip(tensors, places, strict=True)))
        for i, tensor in tensors.items():
            assert memory is not None
            shared = copies.places[i].of(memory)
            shared.copy_(tensor.detach())
            copies.known[i] = shared if home is None else tensor.detach().clone()
        self._copies[name] = copies
        if latest is not None and latest.memory is not None:
            self._close(latest.memory)  # No round uses it any more. The new block has another descriptor.
        return copies

    def _on_host(self, nbytes: int) -> SharedMemory:
        self._host.append(SharedMemory.create(nbytes))
        return self._host[-1]

    def _close(self, memory: SharedMemory) -> None:
        self._host.remove(memory)
        memory.close()

    def close(self) -> None:
        """Close the descriptors. The memory can no longer be opened, but the pipeline's weights stay in it."""
        self._copies.clear()
        for key in [key for key, (weights, _) in self._places.items() if weights.block.host is not None]:
            del self._places[key]
        for memory in self._host:
            memory.close()
        self._host.clear()


def _lay_out(
    tensors: Sequence[Tensor], private: bool, home: torch.device | None = None
) -> tuple[list[TensorLocation], int]:
    """Return the places of tensors in a block, one after another, and the length of the block."""
    places, offset = [], 0
    for tensor in tensors:
        on_host = home is not None and tensor.device.type == "cpu"
        place = TensorLocation(0, offset, tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), private, on_host)
        places.append(place)
        offset += aligned(place.count * tensor.element_size())
    return places, offset


def _groups(weights: Sequence[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Yield weights on one device in groups of about `MAX_BLOCK_NBYTES`, in order."""
    group: list[list[Tensor]] = []
    nbytes = 0
    for same in weights:
        if group and nbytes + same[0].nbytes > MAX_BLOCK_NBYTES:
            yield group
            group, nbytes = [], 0
        group.append(same)
        nbytes += same[0].nbytes
    if group:
        yield group


def free_cached() -> None:
    """Release the memory that torch caches on the GPU, for the workers there."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types for it
        torch.cuda.empty_cache()


def fingerprint(tensor: Tensor) -> tuple[int, ...]:
    """Return two sums of a tensor's bytes, weighted by position, to detect changes; one synchronization of a GPU."""
    if not tensor.numel():
        return ()
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if len(flat) % (8 * ROW) or flat.storage_offset() % 8:
        flat = torch.cat([flat, flat.new_zeros(-len(flat) % (8 * ROW))])
    words = flat.view(torch.int64).view(-1, ROW)
    sums = words.sum(1), words.sum(0)
    weights = (2 * torch.arange(len(s), device=s.device) + 1 for s in sums)
    return tuple(torch.stack([(s * w).sum() for s, w in zip(sums, weights, strict=True)]).tolist())


def _key(tensor: Tensor) -> Key:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.dtype, tuple(tensor.stride())


def _equal(copy: Tensor, tensor: Tensor) -> bool:
    return _key(copy)[1:] == _key(tensor)[1:] and equal_bits(copy, tensor)
