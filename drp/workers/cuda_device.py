"""A worker's CUDA device: its stream, opened IPC memory, and copies in and out.

All operations are queued on one stream, since the copy of a draft, its evaluation and the copy of its prediction depend
on each other. `drp.workers.cuda_executor` overlaps copies with evaluations, since it knows the next draft in advance.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from drp.errors import CudaError
from drp.models.finite import check_finite
from drp.models.gpu import in_dtype, warmed
from drp.models.registry import Denoiser
from drp.nvtx import annotate, annotate_methods
from drp.protocol.arena import Arena
from drp.protocol.cuda import GpuMemory, index_of, invert_probe, pin, unpin
from drp.protocol.handles import GpuHandle
from drp.protocol.messages import GpuConfig
from drp.workers.cuda_errors import is_unrecoverable
from drp.workers.weights import Weights


class CudaDevice:
    """One GPU. Its stream becomes the current one of the constructing thread."""

    def __init__(self, config: GpuConfig) -> None:
        self.config = config
        self.device = torch.device("cuda", index_of(config.device))
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]  # torch has no types for it
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
        self._opened: dict[bytes, GpuMemory] = {}
        self._pinned: dict[int, int] = {}

    def in_dtype(self, denoiser: Denoiser) -> Denoiser:
        """Return the denoiser in the requested dtype, its weights still on the device where they were made.

        A model with a method `use_gpu` sees to its weights itself.
        """
        if hasattr(denoiser.predict, "use_gpu"):
            denoiser.predict.use_gpu(self)
            return denoiser
        return in_dtype(denoiser, self.config)

    def share(self, weights: Weights, handle: GpuHandle, publish: bool) -> str:
        """Move the weights into the leader's memory on this GPU; return the error, or an empty string."""
        try:
            memory = self.open_ipc(handle)
        except (CudaError, RuntimeError) as error:
            return _describe(error)
        weights.share(memory, publish)
        self._synchronize()
        torch.cuda.empty_cache()  # A factory may have put the module's own here.
        return ""

    def warm(self, denoiser: Denoiser) -> Denoiser:
        """Return the denoiser on this GPU, compiled, captured and warmed up as configured."""
        own = hasattr(denoiser.predict, "use_gpu")
        ready = denoiser if own else warmed(denoiser, self.device, self.config)
        self._synchronize()
        if not self.config.nvtx or own:
            return ready
        annotate_methods(self, copy_in="drp copy in", copy_out="drp copy out")
        return replace(ready, predict=annotate("drp compute", ready.predict))

    @property
    def is_context_lost(self) -> bool:
        """Whether this process's CUDA context is unusable, whatever error a library raised for it."""
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            return is_unrecoverable(error)
        return False

    def answer_probe(self) -> str:
        """Write to the leader's probe, if there is one; return the error, or an empty string."""
        if self.config.probe is None:
            return ""
        try:
            invert_probe(self.open_ipc(self.config.probe))
        except (CudaError, RuntimeError) as error:
            return _describe(error)
        return ""

    def open_ipc(self, handle: GpuHandle) -> GpuMemory:
        """Open the leader's memory by CUDA IPC. It stays open, and is reused when it comes with another run."""
        if handle.memory not in self._opened:
            self._opened[handle.memory] = GpuMemory.open(handle)
        return self._opened[handle.memory]

    def bind(self, run: int, arena: Arena) -> None:
        """Copy a run's conditions to this GPU; pin an arena on the host, for asynchronous copies."""
        arena.memory.wait_event()
        if arena.memory.device.type == "cpu":
            start = arena.drafts.untyped_storage().data_ptr()
            if pin(start, arena.memory.nbytes):
                self._pinned[run] = start  # Else copies go by way of the driver's own buffer: slower, no worse.
        # Copies also of what is in memory of a GPU: each evaluation would read a peer's across the link.
        arena.cond = {name: value.to(self.device, copy=True) for name, value in arena.cond.items()}
        self._synchronize()

    def unbind(self, run: int) -> None:
        if run in self._pinned:
            unpin(self._pinned.pop(run))

    def evaluate(
        self,
        denoiser: Denoiser,
        arena: Arena,
        inputs: Sequence[Mapping[str, Tensor]],
        timesteps: Sequence[float],
        outputs: Sequence[Mapping[str, Tensor]],
    ) -> float:
        """Evaluate as `Denoiser.evaluate_batch` does, wherever the drafts lie; return when everything is finished.

        Raises FloatingPointError if a prediction is not finite.
        """
        arena.memory.wait_event()
        made = [{name: torch.empty_like(value, device=self.device) for name, value in each.items()} for each in outputs]
        here = self.copy_in(inputs)
        denoiser.evaluate_batch(here, timesteps, arena.cond, made)
        self.copy_out(made, outputs)
        self._synchronize()
        finished = time.perf_counter()
        for given, mine in zip(here, made, strict=True):
            check_finite(mine, given)  # Not in the arena, where it would compute on another process's GPU.
        return finished

    def copy_in(self, inputs: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return the drafts on this GPU, copied if they lie elsewhere."""
        return [{name: value.to(self.device, non_blocking=True) for name, value in each.items()} for each in inputs]

    def copy_out(self, made: Sequence[Mapping[str, Tensor]], outputs: Sequence[Mapping[str, Tensor]]) -> None:
        for output, mine in zip(outputs, made, strict=True):
            for name, value in output.items():
                value.copy_(mine[name], non_blocking=True)

    def _synchronize(self) -> None:
        """Wait for queued work by spinning, because waking up would take longer."""
        self._done.record()
        self._done.synchronize()


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
