"""The options of a leader, validated before any worker starts."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypedDict

from drp.leader.devices import Device, Devices, parse_devices, split_devices
from drp.leader.execution import ExecutionOptions
from drp.leader.remote import RemoteWorkers
from drp.leader.scheduling.policies import Policy, find_policy
from drp.limits import check_whole
from drp.protocol.messages import MAX_BATCHED


class LeaderArguments(TypedDict, total=False):
    """The keyword arguments of `Leader`; see `LeaderOptions`."""

    devices: Devices
    threads: int
    drafts_per_device: int
    policy: str | Policy
    execution: ExecutionOptions
    start_timeout: float
    draft_timeout: float | None
    python: str | os.PathLike[str] | None


@dataclass(frozen=True)
class LeaderOptions:
    """The options of a leader.

    devices: a count, of GPUs where CUDA shows any, else of cores, or names (`"cpu"`, `["cpu:0", "cpu:1"]`, `"4xcuda"`,
        `"8xemulated:20ms"`); see `drp.leader.devices`. `drp.RemoteWorkers`, alone or in a list with names, are workers
        on other machines.
    threads: the number of threads of each worker.
    drafts_per_device: evaluate this many drafts of a round as one batch; see docs/gpus.md. By default the `drafts` of a
        run are then this many times the number of devices. The samples equal those of `drp.reference` with the same
        number.
    policy: when drafts are sent, to which worker, and whether to a second one: a policy or its name, see
        `drp.leader.scheduling.policies`.
    execution: how workers evaluate drafts and how runs are dispatched to them.
    start_timeout: seconds within which every worker must start and load the model.
    draft_timeout: seconds within which a worker must evaluate a draft, after which it counts as lost. By default a
        minute for its first draft of a run, and then 20 times the run's slowest evaluation so far, at least 5 seconds.
    python: the workers' Python interpreter; by default this program's, or, in a program that embeds Python, the one in
        the environment's folder. It must have the same version.

    Raises ValueError for an invalid option. Devices are looked up when they are first needed, since that initializes
    CUDA.
    """

    devices: Devices = 1
    threads: int = 1
    drafts_per_device: int = 1
    policy: str | Policy = "load-adaptive"
    execution: ExecutionOptions = field(default_factory=ExecutionOptions)
    start_timeout: float = 120.0
    draft_timeout: float | None = None
    python: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        for name, value in (("start_timeout", self.start_timeout), ("draft_timeout", self.draft_timeout)):
            if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise ValueError(f"{name} is {value!r}; give seconds above 0")
        if not isinstance(self.execution, ExecutionOptions):
            raise ValueError(f"execution is {self.execution!r:.80}; give a drp.ExecutionOptions")
        whole = check_whole("drafts_per_device", self.drafts_per_device, 1, MAX_BATCHED)
        object.__setattr__(self, "drafts_per_device", whole)
        hedge = self.scheduling_policy.hedge
        if self.execution.dispatch == "async" and hedge is not None:
            raise ValueError(
                f'hedge is {hedge}, but with dispatch="async" no draft is sent twice: it would wait for the later of '
                'two predictions; give dispatch="auto" or another policy'
            )
        if self.execution.dispatch == "async" and self.remote is not None:
            raise ValueError(
                'dispatch is "async", which needs memory that all workers share, but devices holds RemoteWorkers; give '
                'dispatch="auto"'
            )

    @property
    def remote(self) -> RemoteWorkers | None:
        return split_devices(self.devices)[1]

    @property
    def effective_execution(self) -> ExecutionOptions:
        """The execution options; with workers on other machines, dispatch is synchronous and runs lie on the host."""
        return self.execution if self.remote is None else replace(self.execution, dispatch="sync", memory="host")

    @property
    def scheduling_policy(self) -> Policy:
        return find_policy(self.policy)

    @cached_property
    def worker_devices(self) -> tuple[Device, ...]:
        """The device of each worker; raises ValueError for unknown devices."""
        return parse_devices(self.devices, self.threads)

    @property
    def drafts(self) -> int:
        """The number of drafts that all workers evaluate at once."""
        return len(self.worker_devices) * self.drafts_per_device
