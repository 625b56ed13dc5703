"""A worker's CUDA device: its stream, opened IPC memory, and copies in and out.

Everything goes to one stream: a draft, its evaluation and its prediction must follow one another.
The next draft's copy could only overlap if that were queued already, as it is by `drp.workers.cuda_executor`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from drp.errors import CudaError
from drp.models.gpu import in_dtype, warmed
from drp.models.registry import Denoiser
from drp.nvtx import annotate, annotate_methods
from drp.protocol.arena import Arena
from drp.protocol.cuda import GpuMemory, index_of, invert_probe
from drp.protocol.messages import GpuConfig, GpuHandle
from drp.workers.cuda_errors import is_unrecoverable
from drp.workers.weights import Weights


class CudaDevice:
    """One GPU, for the thread that makes this: its stream is the current one from here on."""

    def __init__(self, how: GpuConfig) -> None:
        self.config = how
        self.device = torch.device("cuda", index_of(how.device))
        torch.cuda.set_device(self.device)
        torch.cuda.set_stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]  # torch has no types for it
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
        self._runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch has no types for it
        self._opened: dict[bytes, GpuMemory] = {}
        self._pinned: dict[int, int] = {}

    def in_dtype(self, denoiser: Denoiser) -> Denoiser:
        """Return a denoiser in the dtype asked for, its weights where they were made, most likely on the host."""
        return in_dtype(denoiser, self.config)

    def share(self, weights: Weights, handle: GpuHandle, publish: bool) -> str:
        """Have weights lie in the leader's memory here; return why they cannot, empty if they do."""
        try:
            memory = self.open_ipc(handle)
        except (CudaError, RuntimeError) as error:
            return _told(error)
        weights.share(memory, publish)
        self._synchronize()
        torch.cuda.empty_cache()  # A factory may have put the module's own here.
        return ""

    def warm(self, denoiser: Denoiser) -> Denoiser:
        """Return a denoiser that is here with all its weights, ready for its first draft."""
        ready = warmed(denoiser, self.device, self.config)
        self._synchronize()
        if not self.config.nvtx:
            return ready
        annotate_methods(self, copy_in="drp copy in", copy_out="drp copy out")
        return replace(ready, predict=annotate("drp compute", ready.predict))

    @property
    def is_context_lost(self) -> bool:
        """Whether the GPU can no longer be used by this process: libraries name such an error by one of their own."""
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError as error:
            return is_unrecoverable(error)
        return False

    def answer_probe(self) -> str:
        """Write to the leader's probe; return why that cannot be done, empty if it was or there is none."""
        if self.config.probe is None:
            return ""
        try:
            invert_probe(self.open_ipc(self.config.probe))
        except (CudaError, RuntimeError) as error:
            return _told(error)
        return ""

    def open_ipc(self, handle: GpuHandle) -> GpuMemory:
        """Open the leader's memory; it stays open, and is found again when it comes with another run."""
        if handle.memory not in self._opened:
            self._opened[handle.memory] = GpuMemory.open(handle)
        return self._opened[handle.memory]

    def bind(self, run: int, arena: Arena) -> None:
        """Bring a run's conditions here; pin the memory of one that lies on the host, for copies that do not wait."""
        arena.memory.wait_event()
        if arena.memory.device.type == "cpu":
            start = arena.drafts.untyped_storage().data_ptr()
            if not int(self._runtime.cudaHostRegister(start, arena.memory.nbytes, 0)):
                self._pinned[run] = start  # Else copies go by way of the driver's own buffer: slower, no worse.
        arena.cond = {name: value.to(self.device) for name, value in arena.cond.items()}
        self._synchronize()

    def unbind(self, run: int) -> None:
        if run in self._pinned:
            self._runtime.cudaHostUnregister(self._pinned.pop(run))

    def evaluate(
        self,
        denoiser: Denoiser,
        arena: Arena,
        inputs: Sequence[Mapping[str, Tensor]],
        timesteps: Sequence[float],
        outputs: Sequence[Mapping[str, Tensor]],
    ) -> float:
        """Do as `Denoiser.evaluate_batch` does, wherever the drafts lie; return when all was done."""
        arena.memory.wait_event()
        made = [{name: torch.empty_like(value, device=self.device) for name, value in each.items()} for each in outputs]
        denoiser.evaluate_batch(self.copy_in(inputs), timesteps, arena.cond, made)
        self.copy_out(made, outputs)
        self._synchronize()
        return time.perf_counter()

    def copy_in(self, inputs: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Return drafts here, copied if they lie elsewhere."""
        return [{name: value.to(self.device, non_blocking=True) for name, value in each.items()} for each in inputs]

    def copy_out(self, made: Sequence[Mapping[str, Tensor]], outputs: Sequence[Mapping[str, Tensor]]) -> None:
        """Copy predictions to where they are wanted."""
        for output, mine in zip(outputs, made, strict=True):
            for name, value in output.items():
                value.copy_(mine[name], non_blocking=True)

    def _synchronize(self) -> None:
        """Wait for what was queued, without giving the core away: to be woken would take longer."""
        self._done.record()
        self._done.synchronize()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
