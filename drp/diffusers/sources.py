"""The source of a module for workers: its pickle, and the memory of each of its tensors."""

from __future__ import annotations

import hmac
import multiprocessing
import pickle
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from drp.protocol.handles import GpuHandle, Handle
from drp.protocol.memory import NAMES, Memory

DIGEST_NBYTES = 32


@dataclass(frozen=True)
class Block:
    """Memory with tensors, on GPUs, by UUID, or on the host.

    number: the number of the block.
    version: the number of times that the content on the host was replaced. A worker on a GPU has a copy of it.
    """

    number: int
    gpus: Mapping[str, GpuHandle]
    host: Handle | None
    version: int = 0


@dataclass(frozen=True)
class TensorLocation:
    """The place of a tensor: a block, and an offset in bytes.

    private: whether a module may write to it. Writes must not be visible to others, so workers on GPUs use a copy.
    on_host: whether it is on the host although the pipeline is on a GPU.
    """

    block: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    private: bool
    on_host: bool

    @property
    def count(self) -> int:
        """The number of elements from the tensor's first to its last in memory."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    def of(self, memory: Memory) -> Tensor:
        # Messages never name the dtypes of 8 bits that weights may be stored in, so the protocol has none.
        known = self.dtype if self.dtype in NAMES else torch.uint8
        flat = memory.tensor(self.offset, (self.count,), known).view(self.dtype)
        return flat.as_strided(self.shape, self.stride) if len(flat) else flat.view(self.shape)


@dataclass(frozen=True)
class ModuleSource:
    """A module: its pickle, see `drp.diffusers.structure`, and the places of its tensors, in order."""

    pickled: bytes
    blocks: tuple[Block, ...]
    places: tuple[TensorLocation, ...]


def dump_signed(source: ModuleSource) -> bytes:
    """Return a source as bytes, signed with the key that this process shares with its children."""
    data = pickle.dumps(source, pickle.HIGHEST_PROTOCOL)
    return _digest(data) + data


def load_signed(data: bytes) -> ModuleSource:
    """Decode a source; raise PermissionError, before unpickling, if it is not from this process's parent."""
    digest, data = data[:DIGEST_NBYTES], data[DIGEST_NBYTES:]
    if not hmac.compare_digest(digest, _digest(data)):
        raise PermissionError(
            "a module was not signed with the key of this worker's parent; was multiprocessing's authkey changed?"
        )
    source = pickle.loads(data)  # noqa: S301  # this process's own parent has signed it
    assert isinstance(source, ModuleSource)
    return source


def _digest(data: bytes) -> bytes:
    return hmac.digest(multiprocessing.current_process().authkey, data, "sha256")
