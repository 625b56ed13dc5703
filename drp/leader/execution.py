"""How workers evaluate drafts, and how runs are dispatched to them: `ExecutionOptions`."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from drp.protocol.handles import GpuHandle
from drp.protocol.messages import GpuConfig, Half

STORES_IN_ORDER = ("x86_64", "AMD64")
"""Processors on which stores become visible in program order, which `drp.protocol.timeline` relies on."""


@dataclass(frozen=True)
class ExecutionOptions:
    """How workers evaluate drafts; see docs/gpus.md. All but `dispatch` are for GPUs.

    dispatch: with "sync", the leader waits for each prediction before it sends the drafts that are made of it. With
        "async", it sends drafts ahead: waits are queued on the GPUs, or on threads of workers on cores, and completion
        records prove that predictions are finished. The samples are the same. "auto" means "async" where that is
        possible, else "sync": with a policy that hedges, with workers on other machines, on processors other than
        x86-64, and with CUDA drivers older than 11.7's. `drp.Result.dispatch` says which it was.
    dtype: the dtype of the weights and of the evaluation, "float16" or "bfloat16"; by default the model's own. States
        and predictions stay float32.
    compile: compile the model with torch.compile.
    graphs: capture evaluations as CUDA graphs, one for each shape; of pipelines, the calls of a step.
    memory: "auto" places runs in the memory of the first worker's GPU if all workers can access it, else on the host.
        "host" always places them on the host; workers then copy drafts to their GPU and predictions back. The UUID of a
        GPU places them there, whether it has a worker or not.
    nvtx: annotate the work of the leader and the workers with NVTX ranges, for Nsight Systems.

    Raises ValueError for an invalid option.
    """

    dispatch: str = "auto"
    dtype: Half | None = None
    compile: bool = False
    graphs: bool = False
    memory: str = "auto"
    nvtx: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float16", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; give 'bfloat16', 'float16', or None for the model's own")
        if self.memory not in ("auto", "host") and not self.memory.startswith("GPU-"):
            raise ValueError(f"memory is {self.memory!r}; give 'auto', 'host' or the UUID of a GPU")
        if self.dispatch not in ("auto", "sync", "async"):
            raise ValueError(f"dispatch is {self.dispatch!r}; give 'auto', 'sync' or 'async'")
        if self.dispatch == "async" and (machine := platform.machine()) not in STORES_IN_ORDER:
            raise ValueError(
                f"dispatch is 'async', but the processor is {machine}: processes then notify each other by plain "
                "stores to shared memory, which other processors than x86-64 may reorder; give 'auto' or 'sync'"
            )

    @property
    def allows_async(self) -> bool:
        return self.dispatch != "sync" and platform.machine() in STORES_IN_ORDER

    def worker_config(self, uuid: str, batch: int, probe: GpuHandle | None = None) -> GpuConfig:
        """Return the configuration of a worker on this GPU."""
        return GpuConfig(uuid, self.dtype, self.compile, self.graphs, batch, probe, self.nvtx)
