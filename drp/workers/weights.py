"""Sharing of weights: the parameters of a module are moved to shared memory, and its buffers are copied from there."""

from __future__ import annotations

import hashlib
import itertools

import torch
from torch import Tensor, nn

from drp.protocol.memory import Memory, aligned


class Weights:
    """The layout of a module's weights in memory, one after the other, each aligned; empty for a plain callable.

    Each tensor keeps its memory format, so that results have the same bits. Parameters are used in the shared memory;
    buffers are copied, since a module may write to them in an evaluation.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self._places: list[tuple[Tensor, tuple[int, ...], int]] = []
        self._buffers = {id(buffer) for buffer in module.buffers()} if module is not None else set()
        self.nbytes = 0
        digest = hashlib.sha256()
        for name, tensor in (
            itertools.chain(module.named_parameters(), module.named_buffers()) if module is not None else ()
        ):
            stride = torch.empty_like(tensor, device="meta").stride()
            self._places.append((tensor, stride, self.nbytes))
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {stride} {self.nbytes}\n".encode())
            self.nbytes += aligned(tensor.numel() * tensor.element_size())
        self.layout = digest.hexdigest()

    def digest(self) -> str:
        """Return a digest of the values of all parameters and buffers, 32 hexadecimal digits."""
        made = hashlib.blake2b(digest_size=16)
        for tensor, _, _ in self._places:
            flat = tensor.detach().cpu().contiguous().view(-1)
            made.update(flat.view(torch.uint8).numpy().data)
        return made.hexdigest()

    def share(self, memory: Memory, publish: bool) -> None:
        """Use the weights in `memory` from now on; with `publish`, copy this module's weights there first."""
        for tensor, stride, offset in self._places:
            shared = memory.tensor(offset, (tensor.numel(),), tensor.dtype).as_strided(tensor.shape, stride)
            if publish:
                shared.copy_(tensor.detach())
            tensor.data = shared.clone() if id(tensor) in self._buffers else shared
