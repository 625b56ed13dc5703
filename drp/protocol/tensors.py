"""Tensors of the door's messages: to frames and back, and to shared memory and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, TypeAlias

import torch
from torch import Tensor

from drp.protocol.codec import ProtocolError
from drp.protocol.door import MAX_FRAME, MOST_FRAMES, Submit, TensorData
from drp.protocol.memory import DTYPES, NAMES, SharedMemory
from drp.protocol.messages import ModelSpec

Frame: TypeAlias = bytes | memoryview

MOST_DIMENSIONS: Final = 16


class Frames:
    """The tensor frames of one message as it is made: `add` tensors, then send `frames` after the message."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def add(self, tensor: Tensor) -> TensorData:
        """Return what names the tensor in the message. Its numbers are copied only if they are not in one piece."""
        name = _name(tensor)
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if len(flat) > MAX_FRAME or len(self.frames) == MOST_FRAMES:
            raise ValueError(
                f"a tensor of {len(flat)} bytes, and {len(self.frames)} before it; a message has at most {MOST_FRAMES} "
                f"of at most {MAX_FRAME} bytes each"
            )
        self.frames.append(flat.numpy().data)
        return TensorData(name, tuple(tensor.shape), frame=len(self.frames))


class Received:
    """The tensor frames of a message that came: `take` each tensor, then `done`, which refuses frames unnamed."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        if len(frames) > MOST_FRAMES:
            raise ProtocolError(f"{len(frames)} tensors; a message has at most {MOST_FRAMES}")
        self._frames: list[Frame | None] = list(frames)

    def take(self, data: TensorData) -> Tensor:
        """Return a copy of an inline tensor; raise ProtocolError if it is not as the message says."""
        dtype, count = _checked(data)
        if data.frame is None or data.memory is not None:
            raise ProtocolError("a tensor in shared memory where one in a frame is due")
        frame = self._frames[data.frame - 1] if data.frame <= len(self._frames) else None
        if frame is None:
            raise ProtocolError(f"frame {data.frame} is missing, or named twice")
        if len(frame) != count * dtype.itemsize:
            raise ProtocolError(
                f"frame {data.frame} is {len(frame)} bytes long; {list(data.shape)} of {data.dtype} takes "
                f"{count * dtype.itemsize}"
            )
        self._frames[data.frame - 1] = None
        flat = torch.empty(count, dtype=dtype, device="cpu")
        if count:
            flat.view(torch.uint8).numpy().data[:] = frame
        try:
            return flat.view(data.shape)
        except RuntimeError as error:  # no numbers, but more than torch can count in the other dimensions
            raise ProtocolError(f"no tensor has the shape {list(data.shape)}: {error}") from None

    def done(self) -> None:
        """Raise ProtocolError if a frame was not taken."""
        left = [number for number, frame in enumerate(self._frames, start=1) if frame is not None]
        if left:
            raise ProtocolError(f"no field names frame {left[0]}")


def shape_of_samples(submit: Submit, spec: ModelSpec) -> tuple[int, ...]:
    """Return the shape that the samples of a request will have, if it is one that can be."""
    shape = submit.shape if submit.shape is not None else spec.sample_shape or ()
    count = submit.count if submit.count is not None else len(submit.labels or (0,))
    return count, *shape


def nbytes_of_samples(submit: Submit, spec: ModelSpec) -> int:
    """Return how long they will be."""
    return math.prod(shape_of_samples(submit, spec)) * torch.float32.itemsize


def shared(shape: tuple[int, ...]) -> tuple[SharedMemory, Tensor]:
    """Return new shared memory of this process and a tensor float32 in it."""
    memory = SharedMemory.create(math.prod(shape) * torch.float32.itemsize)
    try:
        return memory, memory.tensor(0, shape, torch.float32)
    except BaseException:
        memory.close()
        raise


def open_shared(data: TensorData) -> Tensor:
    """Map a tensor that a peer shares; raise ProtocolError if it is not as the message says."""
    dtype, _ = _checked(data)
    if data.memory is None or data.frame is not None:
        raise ProtocolError("a tensor in a frame where one in shared memory is due")
    memory = SharedMemory.open(data.memory)
    try:
        tensor: Tensor = memory.tensor(0, data.shape, dtype)
        return tensor
    finally:
        memory.close()  # The mapping stays, for the tensor.


def _name(tensor: Tensor) -> str:
    if tensor.dtype not in NAMES:
        raise ValueError(f"a tensor is {tensor.dtype}; choose one of {', '.join(DTYPES)}")
    if tensor.device.type != "cpu":
        raise ValueError(f"a tensor is on {tensor.device}; call .cpu() first, the door's tensors are in host memory")
    if tensor.dim() > MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {tensor.dim()} dimensions; at most {MOST_DIMENSIONS}")
    return NAMES[tensor.dtype]


def _checked(data: TensorData) -> tuple[torch.dtype, int]:
    if data.dtype not in DTYPES:
        raise ProtocolError(f"unknown dtype {data.dtype!r:.80}")
    return DTYPES[data.dtype], math.prod(data.shape)
