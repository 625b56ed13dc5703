"""Weights: a module's parameters and buffers, moved into shared memory, one copy for all workers of a machine."""

from __future__ import annotations

import hashlib
import itertools

from torch import Tensor, nn

from drp.protocol.memory import SharedMemory, aligned


class Weights:
    """How a module's weights lie, one after the other, each aligned; nothing at all for a plain callable."""

    def __init__(self, module: nn.Module | None) -> None:
        self._places: list[tuple[Tensor, int]] = []
        self.nbytes = 0
        digest = hashlib.sha256()
        for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()) if module else ():
            self._places.append((tensor, self.nbytes))
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {self.nbytes}\n".encode())
            self.nbytes += aligned(tensor.numel() * tensor.element_size())
        self.layout = digest.hexdigest()

    def share(self, memory: SharedMemory, publish: bool) -> None:
        """Use the weights in `memory` from now on; copy this module's there first if it is to `publish` them."""
        for tensor, offset in self._places:
            shared = memory.tensor(offset, tensor.shape, tensor.dtype)
            if publish:
                shared.copy_(tensor.detach())
            tensor.data = shared
