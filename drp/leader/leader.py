"""The public Leader. It checks arguments and submits runs to the engine."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from inspect import ismethod
from types import TracebackType
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from drp.leader.engine import Engine
from drp.leader.events import Timeline
from drp.leader.job import make_job
from drp.leader.options import LeaderArguments, LeaderOptions
from drp.leader.request import Request, RequestArguments, make_request
from drp.leader.runs.run_state import InFlightBatch
from drp.leader.runs.session import EvaluationSession
from drp.leader.runs.submission import RunFuture
from drp.leader.scheduling.policies import Policy
from drp.leader.supervision.supervisor import WorkerSlot
from drp.protocol.arena import Arena
from drp.protocol.codec import is_text
from drp.protocol.messages import ModelSpec
from drp.sampling.advice import warn
from drp.sampling.options import check_names
from drp.sampling.result import Result

MAX_MODEL_NAME_LENGTH = 200
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
    def of(cls, worker_slot: WorkerSlot[InFlightBatch]) -> WorkerStatus:
        worker = worker_slot.worker
        pid = worker.pid if worker else None
        lost = worker_slot.generation - (worker is not None)
        name, drafts = worker_slot.device.name, sum(len(sent.tasks) for sent in list(worker_slot.drafts))
        return cls(worker_slot.number, name, worker_slot.state, pid, lost, drafts, worker_slot.last_failure)


class Leader:
    """Worker processes that hold a model, and the sampling runs on them.

        with drp.Leader("digits", devices=2) as leader:
            result = leader.sample(labels=[3, 1, 4], steps=48, mode="aggressive")

    model: the name of a built-in model, `"package.module:factory"`, or such a factory itself.
    options: the options, a `drp.LeaderOptions`; each can also be given by name, which takes precedence.

    Raises ValueError for invalid options, WorkerError if a worker cannot start.
    """

    def __init__(
        self,
        model: str | Callable[[], Any],
        options: LeaderOptions | None = None,
        **arguments: Unpack[LeaderArguments],
    ) -> None:
        if not isinstance(options, LeaderOptions | None):
            raise ValueError(f"options is {options!r:.80}; give a drp.LeaderOptions, or options by name: devices=2")
        check_names(arguments, [each.name for each in fields(LeaderOptions)])
        self._options = replace(options or LeaderOptions(), **arguments)
        name = model_name(model)
        self._engine = Engine(name, self._options)
        self._timeline: Timeline | None = None
        log.debug("%d workers hold %s", len(self._options.worker_devices), name)
        self._end = weakref.finalize(self, self._engine.close)  # also at interpreter exit

    @property
    def options(self) -> LeaderOptions:
        """The options."""
        return self._options

    @property
    def internals(self) -> Engine:
        """The engine and its parts, for tests and debugging. They are not part of the public interface."""
        return self._engine

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
    def policy(self) -> Policy:
        """The policy, which decides when drafts are sent, to which worker, and whether to a second one.

        A policy, or its name, may be assigned while no run is running.
        """
        return self._options.scheduling_policy

    @policy.setter
    def policy(self, policy: str | Policy) -> None:
        self._options = replace(self._options, policy=policy)
        self._engine.set_policy(self._options.scheduling_policy)

    @property
    def workers(self) -> tuple[WorkerStatus, ...]:
        """The status of every worker."""
        return tuple(WorkerStatus.of(worker_slot) for worker_slot in self._engine.supervisor.worker_slots)

    @property
    def dropped(self) -> int:
        """Number of messages dropped because they were malformed or from an unknown sender."""
        return self._engine.pool.dropped

    @property
    def spec(self) -> ModelSpec:
        """The model's specification: its sample shape, classes and default guidance."""
        return self._engine.spec

    @property
    def devices(self) -> tuple[str, ...]:
        """The names of the workers' devices, by worker number."""
        return self._engine.supervisor.device_names

    @property
    def closed(self) -> bool:
        """Whether the leader accepts no more runs, because it was closed or all its workers were lost."""
        return self._engine.closed

    def submit(self, **options: Unpack[RequestArguments]) -> RunFuture:
        """Start a run and return its future; the options are the fields of `drp.leader.request.Request`.

        The future is a `concurrent.futures.Future` of a `drp.Result` and can be cancelled at any time. Concurrent runs
        share the workers, and each run has the samples that it would have alone. Callbacks are called in the leader's
        thread; an exception in a callback ends its run.

        Raises ValueError for invalid options.
        """
        return self._submit(make_request(options))

    def _submit(self, request: Request, advise: bool = False) -> RunFuture:
        job = make_job(request, self.spec, self._options.drafts)
        if advise:
            warn(job.solver.grid.steps, job.mode.width, job.solver.adds_noise)
        job = replace(job, mode=self.policy.schedule(job.mode))
        if self._engine.in_engine_thread:
            raise RuntimeError("a callback must not use the leader that calls it")
        return self._engine.submit(job, request.callback)

    def sample(self, **options: Unpack[RequestArguments]) -> Result:
        """Sample once; the options are the fields of `drp.leader.request.Request`. Any thread may call this.

        A worker that dies or does not answer in time is replaced. Other workers evaluate its drafts in the meantime,
        and the samples are the same; `result.incidents` reports the loss. Raises ValueError for invalid options,
        WorkerError if the denoiser raises, if every worker that evaluates a draft is lost, or if no worker is left. The
        leader is closed only in the last case. Logs a warning, once, where drafting is not worthwhile (docs/drafts.md).
        """
        pending = self._submit(make_request(options), advise=True)
        try:
            return pending.result()
        finally:
            pending.cancel()  # If this thread was interrupted, the run is no longer needed.

    def open_session(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], slots: int, cond: Mapping[str, Tensor]
    ) -> EvaluationSession:
        """Start a session, which evaluates drafts for a caller with its own arithmetic; see `drp.leader.runs.session`.

        Args:
            inputs: tensors by name whose shapes and dtypes a draft has.
            outputs: tensors by name whose shapes and dtypes a prediction has.
            slots: the number of drafts that the session's memory holds.
            cond: tensors by name that are copied to the session's memory, the same for all evaluations.
        """
        if self._engine.in_engine_thread:
            raise RuntimeError("a callback must not use the leader that calls it")
        allocate = self._engine.allocate_for_caller
        return self._engine.open_session(
            lambda number, spare: Arena.lay_out(number, inputs, outputs, slots, slots + spare, cond, allocate)
        )

    @property
    def shares_gpu_memory(self) -> bool:
        """Whether this process and workers on the same GPU can share its memory by CUDA IPC."""
        return self._engine.shares_gpu_memory

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


def model_name(model: str | Callable[[], Any]) -> str:
    """Return the name by which a worker can import the model's factory; raise ValueError if there is none."""
    if isinstance(model, str):
        return _check_name(model)
    module, name = getattr(model, "__module__", None), getattr(model, "__qualname__", None)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if module == "__main__" and spec is not None:  # run by `python -m`: workers can import it by its own name
        module = spec.name
    bound = ismethod(model) and not isinstance(model.__self__, type)  # A worker does not have its object.
    if not module or not name or "<" in name or bound:
        given = name if isinstance(name, str) else f"of type {type(model).__qualname__}"  # Not the text of a network.
        raise ValueError(
            f"model {given} cannot be imported by a worker; define a function at the top of a module that returns it, "
            "and give that, or its name 'module:function'"
        )
    return _check_name(f"{module}:{name}")


def _check_name(name: str) -> str:
    if len(name) > MAX_MODEL_NAME_LENGTH or not is_text(name):
        raise ValueError(
            f"model {name!r:.100} has {len(name)} characters; give a name of {MAX_MODEL_NAME_LENGTH} at most, without "
            "lone surrogates"
        )
    return name
