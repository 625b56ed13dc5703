"""The memory of one run, whose layout the leader and the workers derive in the same way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from drp.errors import ProtocolError
from drp.protocol.handles import GpuHandle, Handle
from drp.protocol.memory import ALIGNMENT, DTYPES, NAMES, Memory, SharedMemory, aligned
from drp.protocol.messages import Bind, TensorSpec

Allocate = Callable[[int], Memory]


class Arena:
    """Slots for the drafts of one run, rows for its predictions, and the conditions of its denoiser.

        offset 0    drafts, one for each slot, each padded to the alignment
                    predictions, one for each row, each padded to the alignment
                    conditions
        `end`       further memory, if it was requested

    drafts, predictions: the first tensor of all drafts [slots, D] and of all predictions [rows, D], with D elements. A
        run whose denoiser takes a state and returns a prediction like it has no other tensors.
    slot_bytes, row_bytes, cond_bytes: the same memory as bytes [slots, bytes], [rows, bytes] and [bytes].
    """

    def __init__(self, memory: Memory, bind: Bind) -> None:
        self.memory = memory
        self.bind = bind
        slot_nbytes, row_nbytes = _stride(bind.inputs), _stride(bind.outputs)
        rows = bind.slots * slot_nbytes
        cond = rows + bind.rows * row_nbytes
        self.end = _end(bind.cond, cond)
        self.slot_bytes = memory.tensor(0, (bind.slots, slot_nbytes), torch.uint8)
        self.row_bytes = memory.tensor(rows, (bind.rows, row_nbytes), torch.uint8)
        self.cond_bytes = memory.tensor(cond, (self.end - cond,), torch.uint8)
        self._inputs = _by_name(self.slot_bytes, bind.inputs)
        self._outputs = _by_name(self.row_bytes, bind.outputs)
        self.drafts = self._inputs[bind.inputs[0].name]
        self.predictions = self._outputs[bind.outputs[0].name]
        self.cond = {spec.name: _view(memory, spec) for spec in bind.cond}

    def draft(self, slot: int) -> dict[str, Tensor]:
        """Return the tensors of the draft in a slot, by name."""
        return {spec.name: self._inputs[spec.name][slot].view(spec.shape) for spec in self.bind.inputs}

    def prediction(self, row: int) -> dict[str, Tensor]:
        """Return the tensors of the prediction in a row, by name."""
        return {spec.name: self._outputs[spec.name][row].view(spec.shape) for spec in self.bind.outputs}

    @classmethod
    def create(
        cls,
        run: int,
        state: Tensor,
        slots: int,
        rows: int,
        cond: Mapping[str, Tensor],
        make: Allocate = SharedMemory.create,
        more: int = 0,
    ) -> Arena:
        """Create the arena of a run whose drafts and predictions are like `state`, and copy `cond` to it."""
        like = {"x": state}
        return cls.lay_out(run, like, like, slots, rows, cond, make, more)

    @classmethod
    def lay_out(
        cls,
        run: int,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        slots: int,
        rows: int,
        cond: Mapping[str, Tensor],
        make: Allocate = SharedMemory.create,
        more: int = 0,
    ) -> Arena:
        """Create the arena of a run with `slots` drafts like `inputs` and `rows` predictions like `outputs`.

        `cond` is copied to it. `make(nbytes)` allocates the memory, which includes `more` bytes after `end`.
        """
        if not inputs or not outputs:
            raise ValueError("a slot without tensors; name at least one input and one output")
        (drafts, slot_nbytes), (predictions, row_nbytes) = _specs("input", inputs), _specs("output", outputs)
        specs, end = _specs("cond", cond, slots * slot_nbytes + rows * row_nbytes)
        memory = make(end + more)
        handle, gpu = memory.ipc_handles
        arena = cls(memory, Bind(run, handle, slots, rows, drafts, predictions, specs, gpu, memory.number))
        for name, tensor in cond.items():
            arena.cond[name].copy_(tensor)
        return arena

    @classmethod
    def open(
        cls,
        bind: Bind,
        reach: Callable[[GpuHandle], Memory] | None = None,
        find: Callable[[Handle, int], SharedMemory] = lambda handle, number: SharedMemory.open(handle),
    ) -> Arena:
        """Open the arena that a leader's Bind describes.

        `reach` opens memory of a GPU, `find` memory of the host, by its handle and number; both may cache it.
        """
        if bind.gpu is not None and bind.memory is None and reach is not None:
            return cls(reach(bind.gpu), bind)
        if bind.memory is None or bind.gpu is not None:
            raise ProtocolError("an arena lies either in shared memory or, for a worker on one, in a GPU's")
        memory = find(bind.memory, bind.number)
        try:
            return cls(memory, bind)
        finally:
            memory.close()  # The mapping stays, for the tensors.

    def close(self, reuse: bool = True) -> None:
        """Close the memory; its tensors must not be used any more. `reuse`: no worker writes to it any more."""
        self.memory.close(reuse)


def _specs(what: str, tensors: Mapping[str, Tensor], start: int = 0) -> tuple[tuple[TensorSpec, ...], int]:
    """Return the layout of tensors one after the other, from an offset, and the offset after them."""
    specs = []
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"{what}[{name!r}] is {tensor.dtype}; choose one of {', '.join(DTYPES)}")
        specs.append(TensorSpec(name, NAMES[tensor.dtype], tuple(tensor.shape), start))
        start += aligned(tensor.numel() * tensor.element_size())
    return tuple(specs), start


def _end(specs: Sequence[TensorSpec], start: int = 0) -> int:
    """Return the offset after the last of the tensors, which begin at an offset."""
    end = start
    for spec in specs:
        end = max(end, spec.offset + aligned(_nbytes(spec)))
    return end


def _stride(specs: Sequence[TensorSpec]) -> int:
    """Return the number of bytes from one slot to the next."""
    if not specs:
        raise ProtocolError("a slot without tensors")
    return _end(specs)


def _nbytes(spec: TensorSpec) -> int:
    if spec.dtype not in DTYPES:
        raise ProtocolError(f"unknown dtype {spec.dtype!r}")
    return math.prod(spec.shape) * DTYPES[spec.dtype].itemsize


def nbytes_of(bind: Bind) -> int:
    """Return the bytes of the memory that a Bind describes; raise ProtocolError if its tensors cannot be."""
    return _end(bind.cond, bind.slots * _stride(bind.inputs) + bind.rows * _stride(bind.outputs))


def _by_name(rows: Tensor, specs: Sequence[TensorSpec]) -> dict[str, Tensor]:
    """Return each tensor of every slot as a matrix [slots, D]; `rows` [slots, bytes] uint8 are the slots."""
    if any(spec.offset % ALIGNMENT for spec in specs):
        raise ProtocolError(f"a tensor of a slot does not begin at a multiple of {ALIGNMENT} bytes")
    return {spec.name: rows[:, spec.offset : spec.offset + _nbytes(spec)].view(DTYPES[spec.dtype]) for spec in specs}


def _view(memory: Memory, spec: TensorSpec) -> Tensor:
    _nbytes(spec)
    return memory.tensor(spec.offset, spec.shape, DTYPES[spec.dtype])
