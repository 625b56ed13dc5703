"""Module state: the buffers of a denoiser, restored after each evaluation that has written to them."""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass
class _Kept:
    """A buffer, a copy of its content, and its version at that time.

    The version is None once the buffer was written, since later writes may not be counted.
    """

    buffer: Tensor
    content: Tensor
    version: int | None


class ModuleState:
    """The buffers of modules as they were at the last `capture`.

    A prediction must depend only on its arguments, because neither the worker that evaluates a draft nor the order of
    evaluations is known in advance. A module may therefore write to its buffers during an evaluation, but every
    evaluation starts with the captured content. Writes are detected by torch's version counter. A captured CUDA graph
    writes without increasing it, so a buffer that was written once is restored after every later evaluation.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._modules = modules
        self.needs_autograd = False
        """Whether an evaluation has failed in inference mode because it takes gradients."""
        self.evaluations = self.draws = 0
        """Evaluations so far, and how many of the second and the third have drawn random numbers."""
        self.capture()

    def capture(self) -> None:
        """Capture the buffers' current content as the one to restore, for example after the module was moved."""
        owners = [module for root in self._modules for module in root.modules() if module._buffers]
        self._tables = [(owner._buffers, dict(owner._buffers)) for owner in owners]
        self._kept = [
            _Kept(buffer, buffer.detach().clone(), None if buffer.is_inference() else buffer._version)
            for buffer in {id(b): b for _, names in self._tables for b in names.values() if b is not None}.values()
        ]

    @property
    def is_written(self) -> bool:
        """Whether the last evaluation may have written to a buffer or replaced one by another tensor."""
        # Plain loops, because this is asked after every evaluation.
        for kept in self._kept:
            if kept.version is None or kept.buffer._version != kept.version:
                return True
        for table, names in self._tables:
            for name, buffer in names.items():
                if table.get(name) is not buffer:
                    return True
        return False

    def restore(self) -> None:
        for table, names in self._tables:
            table.update(names)
        for kept in self._kept:
            if kept.version is None or kept.buffer._version != kept.version:
                with torch.no_grad(), torch.inference_mode(kept.buffer.is_inference()):
                    kept.buffer.copy_(kept.content)
                kept.version = None


def random_states(gpus: Iterable[torch.device]) -> list[object]:
    """Return the states of the global random number generators of torch (host and GPUs), numpy and Python."""
    tensors = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, sorted(gpus, key=str))]
    numbers = np.random.get_state(legacy=False)
    return [*(tensor.numpy().tobytes() for tensor in tensors), pickle.dumps(numbers), random.getstate()]


def others_draw(gpus: Iterable[torch.device], seconds: float = 0.5) -> bool:
    """Return whether other threads of the program draw random numbers within some seconds."""
    gpus = list(gpus)
    before = random_states(gpus)
    time.sleep(seconds)
    return random_states(gpus) != before
