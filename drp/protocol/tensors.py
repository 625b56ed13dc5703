"""Conversion of torch tensors to the frames of the client protocol and back, and to shared memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drp.errors import ProtocolError
from drp.protocol.client_messages import TensorData
from drp.protocol.frames import FrameReader, FrameWriter
from drp.protocol.memory import DTYPES, NAMES, SharedMemory


class Frames(FrameWriter):
    """The tensor frames of a message to be sent: `add` tensors, then send `frames` after the message."""

    def add(self, tensor: Tensor) -> TensorData:
        """Add a tensor and return its description for the message. It is copied only if it is not contiguous."""
        if tensor.dtype not in NAMES:
            raise ValueError(f"a tensor is {tensor.dtype}; choose one of {', '.join(DTYPES)}")
        if tensor.device.type != "cpu":
            raise ValueError(f"a tensor is on {tensor.device}; call .cpu() first, it is sent from host memory")
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        return self.add_bytes(NAMES[tensor.dtype], tensor.shape, flat.numpy().data)


class Received(FrameReader):
    """The tensor frames of a received message: `take` each, then call `done`, which refuses surplus frames."""

    def take(self, data: TensorData) -> Tensor:
        """Return a copy of an inline tensor; raise ProtocolError if it does not match the message."""
        frame = self.take_bytes(data)
        dtype = DTYPES[data.dtype]
        flat = torch.empty(math.prod(data.shape), dtype=dtype, device="cpu")
        if len(frame):
            flat.view(torch.uint8).numpy().data[:] = frame
        try:
            return flat.view(data.shape)
        except RuntimeError as error:  # no numbers, but more than torch can count in the other dimensions
            raise ProtocolError(f"no tensor has the shape {list(data.shape)}: {error}") from None


def shared(shape: tuple[int, ...]) -> tuple[SharedMemory, Tensor]:
    """Allocate shared memory; return it with a float32 tensor in it."""
    memory = SharedMemory.create(math.prod(shape) * torch.float32.itemsize)
    try:
        return memory, memory.tensor(0, shape, torch.float32)
    except BaseException:
        memory.close()
        raise
