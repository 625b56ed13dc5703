"""Tensors of a message as frames of bytes, from which arrays or tensors are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, TypeAlias

from drp.errors import ProtocolError
from drp.protocol.client_messages import MAX_FRAME_NBYTES, MAX_FRAMES, Submit, TensorData
from drp.protocol.messages import ModelSpec

Frame: TypeAlias = bytes | memoryview

MAX_DIMENSIONS: Final = 16

ITEM_SIZES: Final = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "complex64": 8,
    "complex128": 16,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""The size of an element in bytes, by the name of its dtype."""


class FrameWriter:
    """The tensor frames of a message to be sent, which follow it."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def add_bytes(self, dtype: str, shape: Sequence[int], data: memoryview) -> TensorData:
        """Add a tensor and return its description for the message. `data`, its elements in C order, is not copied.

        Raises ValueError for a tensor that a message cannot contain.
        """
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {len(shape)} dimensions; at most {MAX_DIMENSIONS}")
        if data.nbytes > MAX_FRAME_NBYTES or len(self.frames) == MAX_FRAMES:
            raise ValueError(
                f"a tensor of {data.nbytes} bytes, and {len(self.frames)} before it; a message has at most "
                f"{MAX_FRAMES} of at most {MAX_FRAME_NBYTES} bytes each"
            )
        self.frames.append(data)
        return TensorData(dtype, tuple(shape), frame=len(self.frames))


class FrameReader:
    """The tensor frames of a received message: take each, then call `done`, which refuses surplus frames."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        if len(frames) > MAX_FRAMES:
            raise ProtocolError(f"{len(frames)} tensors; a message has at most {MAX_FRAMES}")
        self._frames: list[Frame | None] = list(frames)

    def take_bytes(self, data: TensorData) -> Frame:
        """Return the bytes of an inline tensor; raise ProtocolError if they do not match the message."""
        nbytes = count_bytes(data)
        if data.frame is None or data.memory is not None:
            raise ProtocolError("a tensor is in shared memory instead of a frame")
        frame = self._frames[data.frame - 1] if data.frame <= len(self._frames) else None
        if frame is None:
            raise ProtocolError(f"frame {data.frame} is missing, or named twice")
        if len(frame) != nbytes:
            raise ProtocolError(
                f"frame {data.frame} is {len(frame)} bytes long; {list(data.shape)} of {data.dtype} takes {nbytes}"
            )
        self._frames[data.frame - 1] = None
        return frame

    def done(self) -> None:
        """Raise ProtocolError if a frame was not taken."""
        left = [number for number, frame in enumerate(self._frames, start=1) if frame is not None]
        if left:
            raise ProtocolError(f"no field names frame {left[0]}")


def count_bytes(data: TensorData) -> int:
    """Return the size of a tensor in bytes; raise ProtocolError for an unknown dtype."""
    if data.dtype not in ITEM_SIZES:
        raise ProtocolError(f"unknown dtype {data.dtype!r:.80}")
    return math.prod(data.shape) * ITEM_SIZES[data.dtype]


def shape_of_samples(submit: Submit, spec: ModelSpec) -> tuple[int, ...]:
    """Return the shape of the samples of a request, None if it is invalid."""
    shape = submit.shape if submit.shape is not None else spec.sample_shape or ()
    count = submit.count if submit.count is not None else len(submit.labels or (0,))
    return count, *shape


def nbytes_of_samples(submit: Submit, spec: ModelSpec) -> int:
    """Return the size of the samples of a request in bytes."""
    return math.prod(shape_of_samples(submit, spec)) * ITEM_SIZES["float32"]
