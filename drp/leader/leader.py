"""Leader: what a user holds; the work is the engine's."""

from __future__ import annotations

import logging
import math
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from drp.leader.devices import parse_devices
from drp.leader.engine import Engine
from drp.leader.events import Timeline
from drp.leader.memory.placement import GpuOptions
from drp.leader.request import Options, Request, make_job
from drp.leader.runs.run_state import RunFuture
from drp.leader.runs.session import Session
from drp.leader.scheduling.policies import Policy, find_policy
from drp.leader.scheduling.sharing import SharingPolicy
from drp.leader.supervision.supervisor import WorkerSlot
from drp.protocol.arena import Arena
from drp.protocol.codec import is_text
from drp.protocol.messages import MAX_BATCHED, ModelSpec
from drp.sampling.advice import warn
from drp.sampling.result import Result

MOST_CHARACTERS = 200
"""Of a model's name, as the protocol has it."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerStatus:
    """A worker as it is now. `state`: "starting", "ready", "restarting" (lost, to be replaced) or "lost" (given up).

    `pid` is None while there is no process. `lost` counts those that were in its place before. `drafts` are those that
    it has. `last` says how the one before ended.
    """

    number: int
    device: str
    state: str
    pid: int | None
    losses: int
    drafts: int
    last_failure: str

    @classmethod
    def of(cls, worker_slot: WorkerSlot) -> WorkerStatus:
        """Describe what is at a worker slot."""
        process = worker_slot.worker
        pid = process.process.pid if process else None
        lost = worker_slot.generation - (process is not None)
        name, drafts = worker_slot.device.name, sum(len(sent.tasks) for sent in list(worker_slot.drafts))
        return cls(worker_slot.number, name, worker_slot.state, pid, lost, drafts, worker_slot.last_failure)


class Leader:
    """Worker processes that hold a model, and the sampling runs on them.

        with drp.Leader("digits", devices=2) as leader:
            result = leader.sample(labels=[3, 1, 4], steps=48, mode="aggressive")

    model: the name of one in the package, `"package.module:factory"`, or such a factory itself.
    devices: a count, of GPUs where CUDA shows any, else of cores, or names (`"cpu"`, `["cpu:0", "cpu:1"]`, `"4xcuda"`,
        `"8xemulated:20ms"`); see `drp.leader.devices`.
    threads: of each worker.
    start_timeout: seconds that all workers together have to start and load the model.
    draft_timeout: seconds that a worker has to evaluate a draft, after which it counts as lost; by default a minute for
        its first of a run, and then 20 times what the slowest of that run took, at least 5.
    hedge: give a draft that takes this many times the usual to an idle worker too; the first answer counts. By default
        drafts are given twice only when a worker is lost.
    sharing: which run a free worker serves of several; by default by load, see `drp.leader.scheduling.sharing`.
    policy: instead of `hedge` and `sharing`, a name or an object that says all of when drafts go out, to whom, and
        whether twice; see `drp.leader.scheduling.policies`.
    python: the interpreter that the workers run; by default this program's, or in a program that embeds Python the one
        in the environment's folder. It must have the same version.
    drafts_per_device: evaluate so many drafts of a round as one batch; see docs/gpus.md. A run then has this many times
        the devices as its `drafts`, unless told otherwise. The samples are those of `drp.reference` with the same.
    gpu: how workers use their GPUs, a `drp.GpuOptions`.

    Raises ValueError for arguments that cannot be, WorkerError if a worker cannot start.
    """

    def __init__(
        self,
        model: str | Callable[[], Any],
        *,
        devices: int | str | Sequence[str] = 1,
        threads: int = 1,
        start_timeout: float = 120.0,
        draft_timeout: float | None = None,
        hedge: float | None = None,
        sharing: SharingPolicy | None = None,
        policy: str | Policy | None = None,
        python: str | os.PathLike[str] | None = None,
        drafts_per_device: int = 1,
        gpu: GpuOptions | None = None,
    ) -> None:
        for name, value in (("start_timeout", start_timeout), ("draft_timeout", draft_timeout)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; give seconds above 0")
        if policy is not None and (hedge is not None or sharing is not None):
            raise ValueError(f"policy is {policy!r}, which says hedge and sharing itself; leave those out")
        own = find_policy(policy) if policy is not None else None
        check_hedge(gpu, own.hedge if own is not None else hedge)
        if hedge is not None and not 1 < hedge < math.inf:
            raise ValueError(f"hedge is {hedge}; give a factor above 1, such as 1.5, or None")
        self._devices, self._gpu = parse_devices(devices, threads), gpu
        name = model_name(model)
        self._drafts = len(self._devices) * check_batch(drafts_per_device)
        self._engine = Engine(
            name,
            self._devices,
            threads,
            python,
            start_timeout,
            draft_timeout,
            sharing,
            hedge,
            drafts_per_device,
            gpu or GpuOptions(),
        )
        self._policy: Policy | None = None
        if own is not None:
            self.policy = own
        self._timeline: Timeline | None = None
        log.debug("%d workers hold %s", len(self._devices), name)
        self._end = weakref.finalize(self, self._engine.close)  # also at interpreter exit

    @property
    def timeline(self) -> Timeline | None:
        """Give it a list, and runs append their marks."""
        return self._timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        if self._timeline is not None:
            self.unsubscribe(self._timeline)
        self._timeline = timeline
        if timeline is not None:
            self.subscribe(timeline)

    def subscribe(self, timeline: Timeline) -> None:
        """Let runs append their marks to a list beside others, until `leave`."""
        self._engine.recorder.subscribe(timeline)

    def unsubscribe(self, timeline: Timeline) -> None:
        """Append no more marks to a list."""
        self._engine.recorder.unsubscribe(timeline)

    @property
    def policy(self) -> Policy | None:
        """When drafts go out, to whom, and whether twice; None for what `hedge` and `sharing` say.

        Another, or its name, may be set while no run is under way.
        """
        return self._policy

    @policy.setter
    def policy(self, policy: str | Policy) -> None:
        found = find_policy(policy)
        check_hedge(self._gpu, found.hedge)
        self._policy = found
        self._engine.configure_scheduling(self._policy, self._policy.hedge, self._policy.depth)

    @property
    def workers(self) -> tuple[WorkerStatus, ...]:
        """What every worker is doing."""
        return tuple(WorkerStatus.of(worker_slot) for worker_slot in self._engine.supervisor.worker_slots)

    @property
    def dropped(self) -> int:
        """How many messages were dropped because they were none, or from nobody known."""
        return self._engine.dropped

    @property
    def spec(self) -> ModelSpec:
        """What the model expects."""
        return self._engine.spec

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the workers' places, by number."""
        return tuple(device.name for device in self._devices)

    @property
    def closed(self) -> bool:
        """Whether it takes no more runs: it was closed, or its workers were lost."""
        return self._engine.closed

    def submit(self, **options: Unpack[Options]) -> RunFuture:
        """Begin a run and return at once; the options are the fields of `drp.leader.request.Request`.

        What is returned is a `concurrent.futures.Future` with a `drp.Result`, and can be cancelled at any time. Runs
        under way at the same time share the workers, and each has the samples that it would have alone. Callbacks are
        called in the leader's thread; what they raise ends their run.

        Raises ValueError for options that cannot be.
        """
        return self._submit(Request(**options))

    def _submit(self, request: Request, advise: bool = False) -> RunFuture:
        job = make_job(request, self.spec, self._drafts)
        if advise:
            warn(job.solver.grid.steps, job.mode.width, job.solver.adds_noise)
        if self._policy is not None:
            job = replace(job, mode=self._policy.schedule(job.mode))
        if self._engine.in_engine_thread:
            raise RuntimeError("a callback must not use the leader that calls it")
        return self._engine.submit(job, request)

    def sample(self, **options: Unpack[Options]) -> Result:
        """Sample once; the options are the fields of `drp.leader.request.Request`. Any thread may call this.

        A worker that dies or does not answer in time is replaced, others evaluate its drafts meanwhile, and the samples
        are the same; `result.incidents` says so. Raises ValueError for options that cannot be, WorkerError if the
        denoiser raises, if every worker that evaluates a draft is lost, or if no worker is left: only then the leader
        is closed. Logs a warning, once, where drafting is not worth it (docs/drafts.md).
        """
        pending = self._submit(Request(**options), advise=True)
        try:
            return pending.result()
        finally:
            pending.cancel()  # for an interrupt of this thread: nobody wants the run any more

    def open_session(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], slots: int, cond: Mapping[str, Tensor]
    ) -> Session:
        """Begin a session: evaluations for a caller who does the arithmetic himself, see `drp.leader.runs.session`.

        Its `slots` hold drafts, tensors like `inputs`, for predictions like `outputs`; `cond` is copied.
        """
        if self._engine.in_engine_thread:
            raise RuntimeError("a callback must not use the leader that calls it")
        return self._engine.open_session(
            lambda number, spare: Arena.lay_out(number, inputs, outputs, slots, slots + spare, cond)
        )

    def close(self) -> None:
        """Cancel the runs, end the workers and give back all memory; more calls do nothing."""
        if self._engine.in_engine_thread:
            raise RuntimeError("a callback must not use the leader that calls it")
        self._end()
        log.debug("closed")

    def __enter__(self) -> Leader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def check_hedge(gpu: GpuOptions | None, hedge: float | None) -> None:
    """Raise ValueError for drafts given twice where the leader's GPU would wait for the later of the two."""
    if gpu is not None and gpu.dispatch == "async" and hedge is not None:
        raise ValueError(f'hedge is {hedge}, but with dispatch="async" no draft is given twice; leave one of them out')


def check_batch(drafts_per_device: int) -> int:
    """Return it; raise ValueError if no worker can take so many."""
    if (
        isinstance(drafts_per_device, bool)
        or not isinstance(drafts_per_device, int)
        or not 1 <= drafts_per_device <= MAX_BATCHED
    ):
        raise ValueError(f"drafts_per_device is {drafts_per_device!r}; give a whole number from 1 to {MAX_BATCHED}")
    return drafts_per_device


def model_name(model: str | Callable[[], Any]) -> str:
    """Return the name by which a worker can import a factory; raise ValueError if there is none."""
    if isinstance(model, str):
        return _check_name(model)
    module, name = getattr(model, "__module__", None), getattr(model, "__qualname__", None)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if module == "__main__" and spec is not None:  # run by `python -m`: workers can import it by its own name
        module = spec.name
    if not module or not name or "<" in name:
        raise ValueError(f"model {model!r} cannot be imported by a worker; define it by name at the top of a module")
    return _check_name(f"{module}:{name}")


def _check_name(name: str) -> str:
    if len(name) > MOST_CHARACTERS or not is_text(name):
        raise ValueError(
            f"model {name!r:.100} has {len(name)} characters; give a name of {MOST_CHARACTERS} at most, without lone "
            "surrogates"
        )
    return name
