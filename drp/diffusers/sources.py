"""Sources: what a worker is told of a module: its pickle, and the memory in which each of its tensors lies."""

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
    """Memory that holds tensors: on GPUs, by their UUIDs, or else on the host.

    number: a block's own.
    version: counts how often what is on the host was replaced; a worker on a GPU has its own copy of that.
    """

    number: int
    gpus: Mapping[str, GpuHandle]
    host: Handle | None
    version: int = 0


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor lies: in a block, from an offset in bytes on.

    private: a module may write to it, which nobody else may see; on a GPU a worker therefore uses a copy.
    on_host: it is on the host in the pipeline too, though the pipeline is on a GPU.
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
        """How many numbers the memory has that the tensor lies in."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))

    def of(self, memory: Memory) -> Tensor:
        """Return the tensor in its block's memory."""
        # Messages never name the dtypes of 8 bits that weights may be stored in, so the protocol has none.
        known = self.dtype if self.dtype in NAMES else torch.uint8
        flat = memory.tensor(self.offset, (self.count,), known).view(self.dtype)
        return flat.as_strided(self.shape, self.stride) if len(flat) else flat.view(self.shape)


@dataclass(frozen=True)
class Source:
    """A module: its pickle as of `drp.diffusers.structure`, and where its tensors lie, in order."""

    pickled: bytes
    blocks: tuple[Block, ...]
    places: tuple[TensorLocation, ...]


def dump_signed(source: Source) -> bytes:
    """Return a source as bytes, signed with the key that this process shares with its children."""
    data = pickle.dumps(source, pickle.HIGHEST_PROTOCOL)
    return _digest(data) + data


def load_signed(data: bytes) -> Source:
    """Return the source; raise PermissionError if it is not from this process's parent, before it is unpickled."""
    digest, data = data[:DIGEST_NBYTES], data[DIGEST_NBYTES:]
    if not hmac.compare_digest(digest, _digest(data)):
        raise PermissionError(
            "a module was not signed with the key of this worker's parent; was multiprocessing's authkey changed?"
        )
    source = pickle.loads(data)  # noqa: S301  # this process's own parent has signed it
    assert isinstance(source, Source)
    return source


def _digest(data: bytes) -> bytes:
    return hmac.digest(multiprocessing.current_process().authkey, data, "sha256")
