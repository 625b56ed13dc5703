"""Workers: an evaluator that has drafts evaluated by worker processes, all of a round's at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType

import torch
from torch import Tensor

from drp.diffusers.evaluators import Session
from drp.diffusers.program import PROGRAM, Program, to_tensor
from drp.diffusers.pytree import Json
from drp.leader.devices import Devices, parse_devices
from drp.leader.events import Timeline
from drp.leader.leader import Leader, WorkerStatus
from drp.leader.scheduling.policies import Policy
from drp.trace.record import record

MODEL = "drp.diffusers.worker:load"


class Workers:
    """Worker processes for pipelines: hand them to `parallelize` as `devices`, and several pipelines share them.

    devices, start_timeout, draft_timeout, policy: as of `drp.LeaderOptions`.
    threads: of each worker; by default an equal share of this process's.
    """

    def __init__(
        self,
        devices: Devices = 2,
        *,
        threads: int | None = None,
        start_timeout: float = 120.0,
        draft_timeout: float | None = 600.0,
        policy: str | Policy = "load-adaptive",
    ) -> None:
        placed = parse_devices(devices, 1)
        if any(device.emulated is not None and device.emulated.values != "model" for device in placed):
            raise ValueError(f"devices is {devices!r}: values other than the model's are for drp's own models only")
        if any(device.remote is not None for device in placed):
            raise ValueError(
                "devices holds RemoteWorkers: a pipeline's weights are in this machine's shared memory, which workers "
                "on other machines cannot open; name devices of this machine"
            )
        if any(device.gpu is not None for device in placed):
            raise ValueError(
                f"devices is {devices!r}: pipelines run on CPU workers so far; name cpu or emulated devices"
            )
        self.threads = threads or max(1, torch.get_num_threads() // len(placed))
        self._leader = Leader(
            MODEL,
            devices=devices,
            threads=self.threads,
            start_timeout=start_timeout,
            draft_timeout=draft_timeout,
            policy=policy,
        )

    @property
    def devices(self) -> tuple[str, ...]:
        return self._leader.devices

    @property
    def status(self) -> tuple[WorkerStatus, ...]:
        """The status of every worker."""
        return self._leader.workers

    def bind(
        self,
        program: Program,
        sources: Mapping[str, Json],
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        slots: int,
        cond: Mapping[str, Tensor],
    ) -> Session:
        return self._leader.open_session(inputs, outputs, slots, {**cond, PROGRAM: to_tensor(program, sources)})

    def record(self, path: str | os.PathLike[str], most: int | None = None) -> AbstractContextManager[Timeline]:
        """Write a trace of what they do during a block, as `drp.trace.record` does for a leader."""
        return record(self._leader, path, most)

    def close(self) -> None:
        self._leader.close()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
