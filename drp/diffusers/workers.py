"""The evaluator of drafts in worker processes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from types import TracebackType

import torch
from torch import Tensor

from drp.diffusers.devices import gpu_of, weights_of
from drp.diffusers.evaluators import Session
from drp.diffusers.program import PROGRAM, Program, to_tensor
from drp.diffusers.publish import GpuWeights, Publisher
from drp.diffusers.pytree import Json
from drp.leader.devices import Devices, parse_devices
from drp.leader.events import Timeline
from drp.leader.execution import ExecutionOptions
from drp.leader.leader import Leader, WorkerStatus
from drp.leader.scheduling.policies import Policy
from drp.sampling.run import Task
from drp.trace.record import record

MODEL = "drp.diffusers.worker:load"


class Workers:
    """Worker processes for pipelines. Several pipelines can share them, as the `devices` of `parallelize`.

    devices, start_timeout, draft_timeout, policy, execution: as in `drp.LeaderOptions`. On GPUs, latents are in the
        memory of the first one, or as `execution` defines. Weights of pipelines stay in memory until `close`. With
        `ExecutionOptions(graphs=True)`, workers on GPUs capture a step's calls as a CUDA graph at the first draft of
        each shape.
    drafts_per_device: evaluate this many drafts of a round as one batch, if the pipeline's calls can be stacked.
    threads: the number of threads of each worker, by default an equal share of this process's.
    """

    def __init__(
        self,
        devices: Devices = 2,
        *,
        threads: int | None = None,
        start_timeout: float = 120.0,
        draft_timeout: float | None = 600.0,
        policy: str | Policy = "load-adaptive",
        execution: ExecutionOptions | None = None,
        drafts_per_device: int = 1,
    ) -> None:
        placed = parse_devices(devices, 1)
        if any(device.emulated is not None and device.emulated.values != "model" for device in placed):
            raise ValueError(f"devices is {devices!r}: values other than the model's are for drp's own models only")
        if not isinstance(execution, ExecutionOptions | None):
            raise ValueError(f"execution is {execution!r:.80}; give a drp.ExecutionOptions")
        if execution is not None and execution.compile:
            raise ValueError(
                "compile is for models of a drp.Leader; compile the pipeline's module, as by pipe.unet.compile(): "
                "workers do the same"
            )
        if execution is not None and execution.dtype is not None:
            raise ValueError(
                f"dtype is {execution.dtype!r}; a pipeline defines its own dtype: load it with torch_dtype="
            )
        self.threads = threads or max(1, torch.get_num_threads() // len(placed))
        self.drafts_per_device = drafts_per_device
        self.verified: set[int] = set()
        self._gpus = [device.gpu for device in placed if device.remote is None]
        self.has_remote = any(device.remote is not None for device in placed)
        self._weights: dict[str, GpuWeights] = {}
        """The weights on GPUs, by the GPU of their pipeline."""
        self._leader = Leader(
            MODEL,
            devices=devices,
            threads=self.threads,
            start_timeout=start_timeout,
            draft_timeout=draft_timeout,
            policy=policy,
            execution=replace(execution or ExecutionOptions(), dispatch="sync"),  # as sessions are
            drafts_per_device=drafts_per_device,
        )

    @property
    def devices(self) -> tuple[str, ...]:
        return self._leader.devices

    @property
    def status(self) -> tuple[WorkerStatus, ...]:
        """The status of every worker, see `drp.Leader.workers`."""
        return self._leader.workers

    def publisher(self, device: torch.device) -> Publisher | None:
        """Return the publisher of a pipeline's modules to workers on this machine, None if there are none.

        Raises ValueError if the workers are on devices of another kind than the pipeline.
        """
        for name in self.devices if self.has_remote else ():
            host, _, kind = name.rpartition("/")
            if host and kind.startswith("cuda") != (device.type == "cuda"):
                raise ValueError(f"the pipeline is on {device}, and a worker on {name}; both must be GPUs, or neither")
        if not self._gpus:
            return None
        gpus = weights_of(gpu_of(device), self._gpus, self._leader.shares_gpu_memory)
        if gpus is None:
            return Publisher()
        kept = self._weights.setdefault(gpus.home, gpus)
        kept.ipc = gpus.ipc  # A replaced worker may have shown that memory cannot be shared.
        return Publisher(kept)

    def bind(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], slots: int, cond: Mapping[str, Tensor]
    ) -> Session:
        return self._leader.open_session(inputs, outputs, slots, cond)

    def check(self, sources: Mapping[str, Json]) -> None:
        """Have each worker load these modules; raise WorkerError, with the reason, if one cannot."""
        count = len(self.devices) * self.drafts_per_device
        nothing = torch.zeros(1, dtype=torch.int64)  # Nothing is written: floating-point numbers might not be finite.
        cond = {PROGRAM: to_tensor(Program(()), sources)}
        with closing(self.bind({"x": nothing}, {"x": nothing}, count, cond)) as session:
            session.evaluate([Task(number, 0.0, number) for number in range(count)])

    def record(self, path: str | os.PathLike[str], max_events: int | None = None) -> AbstractContextManager[Timeline]:
        """Write a trace of the workers during a block, see `drp.trace.record`."""
        return record(self._leader, path, max_events)

    def close(self) -> None:
        self._leader.close()
        for weights in self._weights.values():
            weights.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def on_gpu_of(device: torch.device, execution: ExecutionOptions | None) -> ExecutionOptions:
    """Return the options with the runs' memory on the pipeline's GPU."""
    options, home = execution or ExecutionOptions(), gpu_of(device)
    return options if home is None or options.memory != "auto" else replace(options, memory=home)
