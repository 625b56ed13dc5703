"""Conversion of numpy arrays and torch tensors to messages and back. torch is used only if it is installed."""

from __future__ import annotations

import importlib
import math
import mmap
import os
import sys
from typing import Any, Literal

import numpy as np

from drp.errors import ProtocolError
from drp.protocol.client_messages import TensorData
from drp.protocol.frames import ITEM_SIZES, FrameReader, FrameWriter, count_bytes
from drp.protocol.memfd import open_memfd

Library = Literal["numpy", "torch"]


def find_library(name: Library | None) -> Library:
    """Return the library of result arrays: `name`, else torch if it is installed, which is then imported."""
    if name not in (None, "numpy", "torch"):
        raise ValueError(f"arrays is {name!r}; choose 'numpy' or 'torch'")
    if name == "numpy":
        return "numpy"
    try:
        importlib.import_module("torch")
    except ImportError:
        if name == "torch":
            raise
        return "numpy"
    return "torch"


def add_array(frames: FrameWriter, name: str, value: Any) -> TensorData:
    """Add an array to the frames and return its description; raise ValueError if it cannot be sent."""
    torch = sys.modules.get("torch")  # Not imported here: a caller that has a tensor has imported it.
    if torch is not None and isinstance(value, torch.Tensor):
        dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
        if value.device.type != "cpu":
            raise ValueError(f"{name} is on {value.device}; call .cpu() first, it is sent from host memory")
        _check(name, dtype)
        value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return frames.add_bytes(dtype, shape, value.data)
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{name} is a {type(value).__name__}; give a tensor, or a numpy array")
    _check(name, value.dtype.name)
    little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
    return frames.add_bytes(little.dtype.name, value.shape, little.reshape(-1).view(np.uint8).data)


def take_array(frames: FrameReader, data: TensorData, library: Library) -> Any:
    """Return a copy of an inline array; raise ProtocolError if it does not match its description."""
    return _array(bytearray(frames.take_bytes(data)), data, library)


def open_array(data: TensorData, library: Library) -> Any:
    """Map an array that a peer shares; raise ProtocolError if it does not match its description."""
    nbytes = count_bytes(data)
    if data.memory is None or data.frame is not None:
        raise ProtocolError("an array is in a frame instead of shared memory")
    if nbytes > data.memory.nbytes:
        raise ProtocolError(f"{list(data.shape)} of {data.dtype} does not fit into {data.memory.nbytes} bytes")
    descriptor = open_memfd(data.memory)
    try:
        mapped = mmap.mmap(descriptor, data.memory.nbytes)  # The mapping outlives the descriptor.
    finally:
        os.close(descriptor)
    return _array(mapped, data, library)


def _array(buffer: bytearray | mmap.mmap, data: TensorData, library: Library) -> Any:
    """Return the array at the beginning of a buffer, which it keeps alive."""
    count = math.prod(data.shape)
    try:
        if library == "numpy":
            return np.frombuffer(buffer, _dtype(data), count).reshape(data.shape)
        torch = sys.modules["torch"]
        dtype = getattr(torch, data.dtype)
        flat = torch.frombuffer(buffer, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
        return flat.view(data.shape)
    except (ValueError, RuntimeError) as error:  # An empty array whose other dimensions overflow.
        raise ProtocolError(f"no array has the shape {list(data.shape)}: {error}") from None


def _dtype(data: TensorData) -> Any:
    if data.dtype == "bfloat16":
        raise ProtocolError("an array is bfloat16, which numpy does not have")
    return np.dtype(data.dtype).newbyteorder("<")


def _check(name: str, dtype: str) -> None:
    if dtype not in ITEM_SIZES:
        raise ValueError(f"{name} is {dtype}; choose one of {', '.join(ITEM_SIZES)}")
