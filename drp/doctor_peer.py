"""A process on a GPU that inverts memory of `drp doctor`, which it opens as a worker opens a leader's."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from drp.errors import ProtocolError
from drp.protocol.cuda import GpuMemory, index_of, invert_probe
from drp.protocol.handles import GpuHandle


def main(uuid: str, handles: Sequence[GpuHandle], results: Connection) -> None:
    """Open and invert each memory; send the error of each, empty for none, or one error for all."""
    try:
        _set_device(uuid)
        results.send([_try(handle) for handle in handles])
    except Exception as error:
        results.send(f"{type(error).__name__}: {error}")


def _try(handle: GpuHandle) -> str:
    try:
        invert_probe(GpuMemory.open(handle))
    except (ProtocolError, RuntimeError) as error:  # a CudaError is a RuntimeError
        return str(error)
    return ""


def _set_device(uuid: str) -> None:
    torch.cuda.set_device(index_of(uuid))
