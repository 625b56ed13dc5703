"""Arena: the memory of one run, laid out the same way by leader and workers."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from drp.protocol.codec import ProtocolError
from drp.protocol.memory import DTYPES, NAMES, SharedMemory, aligned
from drp.protocol.messages import Bind, TensorSpec


class Arena:
    """Slots for drafts and predictions of one run, and the conditions of its denoiser.

    First all drafts, then all predictions, each slot padded to the alignment; then the conditions. `drafts` and
    `predictions` are [slots, D], D the numbers in one state.
    """

    def __init__(self, memory: SharedMemory, bind: Bind) -> None:
        if bind.dtype not in DTYPES:
            raise ProtocolError(f"unknown dtype {bind.dtype!r}")
        self.memory = memory
        self.bind = bind
        dtype = DTYPES[bind.dtype]
        count = math.prod(bind.shape)
        stride = aligned(count * dtype.itemsize)
        rows = (bind.slots, stride // dtype.itemsize)
        self.drafts = memory.tensor(0, rows, dtype)[:, :count]
        self.predictions = memory.tensor(bind.slots * stride, rows, dtype)[:, :count]
        self.cond = {spec.name: _view(memory, spec) for spec in bind.cond}

    @classmethod
    def create(cls, run: int, noise: Tensor, slots: int, cond: Mapping[str, Tensor]) -> Arena:
        """Make the arena of a run whose states are like `noise`, with `cond` copied in."""
        stride = aligned(noise.numel() * noise.element_size())
        end = 2 * slots * stride
        specs = []
        for name, tensor in cond.items():
            if tensor.dtype not in NAMES:
                raise ValueError(f"cond[{name!r}] is {tensor.dtype}; choose one of {', '.join(DTYPES)}")
            specs.append(TensorSpec(name, NAMES[tensor.dtype], tuple(tensor.shape), end))
            end += aligned(tensor.numel() * tensor.element_size())
        memory = SharedMemory.create(end)
        bind = Bind(run, memory.handle, tuple(noise.shape), NAMES[noise.dtype], slots, tuple(specs))
        arena = cls(memory, bind)
        for name, tensor in cond.items():
            arena.cond[name].copy_(tensor)
        return arena

    @classmethod
    def open(cls, bind: Bind) -> Arena:
        """Map the arena that a leader's Bind describes."""
        memory = SharedMemory.open(bind.memory)
        try:
            return cls(memory, bind)
        finally:
            memory.close()  # The mapping stays, for the tensors.

    def close(self) -> None:
        """Let go of it; the tensors must not be used any more."""
        self.memory.close()


def _view(memory: SharedMemory, spec: TensorSpec) -> Tensor:
    if spec.dtype not in DTYPES:
        raise ProtocolError(f"unknown dtype {spec.dtype!r}")
    view: torch.Tensor = memory.tensor(spec.offset, spec.shape, DTYPES[spec.dtype])
    return view
