"""Module state: the buffers of a denoiser, put back after each evaluation that has written to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class _Kept:
    """A buffer, a copy of what it held, and its version then; None once it was written, and may be again unseen."""

    buffer: Tensor
    content: Tensor
    version: int | None

    @property
    def is_written(self) -> bool:
        return self.version is None or self.buffer._version != self.version


class ModuleState:
    """The buffers of modules as they were at the last `capture`.

    A prediction must depend on nothing but its arguments: which worker evaluates a draft, and after which others, is
    not known beforehand. So a module may use its buffers as it likes during an evaluation, and starts the next one with
    what they held before. Whether a buffer was written shows in the version that torch counts; a captured CUDA graph
    writes without counting, so a buffer that was written once is put back after every evaluation from then on.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self.needs_autograd = False
        """Whether an evaluation has failed in inference mode because it takes gradients."""
        self.capture()

    def capture(self) -> None:
        """Take the buffers to be as they should be, for instance after the module was moved."""
        owners = [module for root in self._modules for module in root.modules() if module._buffers]
        self._tables = [(owner._buffers, dict(owner._buffers)) for owner in owners]
        self._kept = [
            _Kept(buffer, buffer.detach().clone(), None if buffer.is_inference() else buffer._version)
            for buffer in {id(b): b for _, names in self._tables for b in names.values() if b is not None}.values()
        ]

    @property
    def is_written(self) -> bool:
        """Whether the last evaluation may have written to a buffer, or put another tensor in its place."""
        return any(kept.is_written for kept in self._kept) or any(
            table.get(name) is not buffer for table, names in self._tables for name, buffer in names.items()
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Put back what was written, or exchanged for another tensor."""
        for table, names in self._tables:
            table.update(names)
        for kept in self._kept:
            if kept.is_written:
                with torch.inference_mode(kept.buffer.is_inference()):
                    kept.buffer.copy_(kept.content)
                kept.version = None
