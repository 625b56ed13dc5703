"""The doctor's peer: a process on a GPU that turns over memory of the doctor's, as a worker would reach it."""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from drp.errors import ProtocolError
from drp.protocol.cuda import GpuMemory, index_of, invert_probe
from drp.protocol.handles import GpuHandle


def main(uuid: str, handles: Sequence[GpuHandle], results: Connection) -> None:
    """Try one after the other; send for each why it could not be reached, empty if it was, or one text for all."""
    try:
        _sit_down(uuid)
        results.send([_try(handle) for handle in handles])
    except Exception as error:
        results.send(f"{type(error).__name__}: {error}")


def _try(handle: GpuHandle) -> str:
    try:
        invert_probe(GpuMemory.open(handle))
    except (ProtocolError, RuntimeError) as error:  # a CudaError is a RuntimeError
        return str(error)
    return ""


def _sit_down(uuid: str) -> None:
    torch.cuda.set_device(index_of(uuid))
