"""The public Leader. It checks arguments and submits runs to the engine."""

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
"""Maximum length of a model's name in the protocol."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerStatus:
    """The current status of a worker.

    number: the worker's number.
    device: the device's name.
    state: "starting", "ready", "restarting" (lost, to be replaced) or "lost" (given up).
    pid: the process, None while there is none.
    losses: how many processes this worker has lost so far.
    drafts: how many drafts the worker has been sent and has not finished.
    last_failure: how its previous process ended; empty if there was none.
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
        """Return the status of a worker slot."""
        process = worker_slot.worker
        pid = process.process.pid if process else None
        lost = worker_slot.generation - (process is not None)
        name, drafts = worker_slot.device.name, sum(len(sent.tasks) for sent in list(worker_slot.drafts))
        return cls(worker_slot.number, name, worker_slot.state, pid, lost, drafts, worker_slot.last_failure)


class Leader:
    """Worker processes that hold a model, and the sampling runs on them.

        with drp.Leader("digits", devices=2) as leader:
            result = leader.sample(labels=[3, 1, 4], steps=48, mode="aggressive")

    model: the name of a built-in model, `"package.module:factory"`, or such a factory itself.
    devices: a count, of GPUs where CUDA shows any, else of cores, or names (`"cpu"`, `["cpu:0", "cpu:1"]`, `"4xcuda"`,
        `"8xemulated:20ms"`); see `drp.leader.devices`.
    threads: the number of threads of each worker.
    start_timeout: seconds within which every worker must start and load the model.
    draft_timeout: seconds within which a worker must evaluate a draft, after which it counts as lost. By default a
        minute for its first draft of a run, and then 20 times the run's slowest evaluation so far, at least 5 seconds.
    hedge: send a draft that takes this many times the median latency to an idle worker as well; the first prediction to
        arrive is used. By default a draft is sent to a second worker only when the first one is lost.
    sharing: which of several runs a free worker serves; by default depends on the load, see
        `drp.leader.scheduling.sharing`.
    policy: instead of `hedge` and `sharing`, a policy object or its name, which decides when drafts are sent, to which
        worker, and whether to a second one; see `drp.leader.scheduling.policies`.
    python: the workers' Python interpreter; by default this program's, or, in a program that embeds Python, the one in
        the environment's folder. It must have the same version.
    drafts_per_device: evaluate this many drafts of a round as one batch; see docs/gpus.md. By default the `drafts` of a
        run are then this many times the number of devices. The samples equal those of `drp.reference` with the same
        number.
    gpu: how workers use their GPUs, a `drp.GpuOptions`.

    Raises ValueError for invalid arguments, WorkerError if a worker cannot start.
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
        """A list to which runs append their events, None by default. Assign a list to begin."""
        return self._timeline

    @timeline.setter
    def timeline(self, timeline: Timeline | None) -> None:
        if self._timeline is not None:
            self.unsubscribe(self._timeline)
        self._timeline = timeline
        if timeline is not None:
            self.subscribe(timeline)

    def subscribe(self, timeline: Timeline) -> None:
        """Append the events of runs to a list, in addition to other lists, until `unsubscribe`."""
        self._engine.recorder.subscribe(timeline)

    def unsubscribe(self, timeline: Timeline) -> None:
        """Stop appending events to a list."""
        self._engine.recorder.unsubscribe(timeline)

    @property
    def policy(self) -> Policy | None:
        """The policy, which decides when and to which worker drafts are sent; None if `hedge` and `sharing` are used.

        A policy object, or its name, may be assigned while no run is running.
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
        """The status of every worker."""
        return tuple(WorkerStatus.of(worker_slot) for worker_slot in self._engine.supervisor.worker_slots)

    @property
    def dropped(self) -> int:
        """Number of messages dropped because they were malformed or from an unknown sender."""
        return self._engine.dropped

    @property
    def spec(self) -> ModelSpec:
        """The model's specification: its sample shape, classes and default guidance."""
        return self._engine.spec

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the workers' devices, by worker number."""
        return tuple(device.name for device in self._devices)

    @property
    def closed(self) -> bool:
        """Whether the leader accepts no more runs, because it was closed or all its workers were lost."""
        return self._engine.closed

    def submit(self, **options: Unpack[Options]) -> RunFuture:
        """Start a run and return its future; the options are the fields of `drp.leader.request.Request`.

        The future is a `concurrent.futures.Future` of a `drp.Result` and can be cancelled at any time. Concurrent runs
        share the workers, and each run has the samples that it would have alone. Callbacks are called in the leader's
        thread; an exception in a callback ends its run.

        Raises ValueError for invalid options.
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

        A worker that dies or does not answer in time is replaced. Other workers evaluate its drafts in the meantime,
        and the samples are the same; `result.incidents` reports the loss. Raises ValueError for invalid options,
        WorkerError if the denoiser raises, if every worker that evaluates a draft is lost, or if no worker is left. The
        leader is closed only in the last case. Logs a warning, once, where drafting is not worthwhile (docs/drafts.md).
        """
        pending = self._submit(Request(**options), advise=True)
        try:
            return pending.result()
        finally:
            pending.cancel()  # If this thread was interrupted, the run is no longer needed.

    def open_session(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], slots: int, cond: Mapping[str, Tensor]
    ) -> Session:
        """Start a session, which evaluates drafts for a caller with its own arithmetic; see `drp.leader.runs.session`.

        Args:
            inputs: tensors by name whose shapes and dtypes a draft has.
            outputs: tensors by name whose shapes and dtypes a prediction has.
            slots: the number of drafts that the session's memory holds.
            cond: tensors by name that are copied to the session's memory, the same for all evaluations.
        """
        if self._engine.in_engine_thread:
            raise RuntimeError("a callback must not use the leader that calls it")
        return self._engine.open_session(
            lambda number, spare: Arena.lay_out(number, inputs, outputs, slots, slots + spare, cond)
        )

    def close(self) -> None:
        """Cancel all runs, end the workers and free all memory. Further calls do nothing."""
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
    """Raise ValueError for hedging with asynchronous dispatch, which would wait for the later of two predictions."""
    if gpu is not None and gpu.dispatch == "async" and hedge is not None:
        raise ValueError(f'hedge is {hedge}, but with dispatch="async" no draft is given twice; leave one of them out')


def check_batch(drafts_per_device: int) -> int:
    """Return `drafts_per_device`; raise ValueError if it is not a valid batch size."""
    if (
        isinstance(drafts_per_device, bool)
        or not isinstance(drafts_per_device, int)
        or not 1 <= drafts_per_device <= MAX_BATCHED
    ):
        raise ValueError(f"drafts_per_device is {drafts_per_device!r}; give a whole number from 1 to {MAX_BATCHED}")
    return drafts_per_device


def model_name(model: str | Callable[[], Any]) -> str:
    """Return the name by which a worker can import the model's factory; raise ValueError if there is none."""
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
