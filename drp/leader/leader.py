"""Leader: runs the rounds. One role, one loop."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

from typing_extensions import Unpack

from drp.leader.devices import parse_devices
from drp.leader.errors import WorkerError
from drp.leader.pool import Pool, WorkerProcess
from drp.leader.request import Job, Options, Request, make_job
from drp.leader.timeline import Mark, Timeline, What
from drp.protocol.arena import Arena
from drp.protocol.messages import Bind, Bound, Draft, ModelSpec, Prediction, Unbind
from drp.sampling.result import Result
from drp.sampling.run import Task

Key = tuple[int, int] | int
"""What a worker owes: the prediction (index, slot), or, by the worker's number, its Bound."""


class Leader:
    """Worker processes that hold a model, and the sampling runs on them.

        with drp.Leader("digits", devices=2) as leader:
            result = leader.sample(labels=[3, 1, 4], steps=48, mode="aggressive")

    model: the name of one in the package, `"package.module:factory"`, or such a factory itself.
    devices: a count, or names (`"cpu"`, `["cpu:0", "cpu:1"]`); see `drp.leader.devices`.
    threads: of each worker.
    start_timeout: seconds that all workers together have to start and load the model.
    draft_timeout: seconds that a worker has to evaluate a draft.

    Raises ValueError for arguments that cannot be, WorkerError if a worker cannot start. Calls from several threads
    are served one after the other.
    """

    def __init__(
        self,
        model: str | Callable[[], Any],
        *,
        devices: int | str | Sequence[str] = 1,
        threads: int = 1,
        start_timeout: float = 120.0,
        draft_timeout: float = 60.0,
    ) -> None:
        for name, value in (("start_timeout", start_timeout), ("draft_timeout", draft_timeout)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; give seconds above 0")
        self._devices = parse_devices(devices, threads)
        self._draft_timeout = draft_timeout
        self._pool = Pool(model_name(model), self._devices, threads, start_timeout)
        self._end = weakref.finalize(self, self._pool.close)  # also at interpreter exit
        self._runs = itertools.count()
        self._lock = threading.Lock()
        self._busy = 0  # the thread that is in a call
        self.timeline: Timeline | None = None
        """Give it a list, and runs append their marks."""

    @property
    def spec(self) -> ModelSpec:
        """What the model expects."""
        return self._pool.spec

    def sample(self, **options: Unpack[Options]) -> Result:
        """Sample once; the options are the fields of `drp.leader.request.Request`.

        Raises ValueError for options that cannot be, WorkerError if a worker raises, dies or does not answer in time:
        then all workers are ended and the leader is closed.
        """
        request = Request(**options)
        job = make_job(request, self.spec, len(self._devices))
        with self._alone():
            if not self._end.alive:
                raise RuntimeError("this leader is closed; make a new one")
            try:
                return self._run(job, request)
            except WorkerError:
                self._end.detach()
                self._pool.close(grace=0.0)
                raise

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for other threads' calls to end; refuse a call from within a callback, which would wait for itself."""
        if self._busy == threading.get_ident():
            raise RuntimeError("a callback must not use the leader that calls it")
        with self._lock:
            self._busy = threading.get_ident()
            try:
                yield
            finally:
                self._busy = 0

    def _run(self, job: Job, request: Request) -> Result:
        began = time.perf_counter()
        number = next(self._runs) % 2**31
        arena = Arena.create(number, job.start, job.slots, job.cond)
        run = job.run(arena.drafts, arena.predictions)
        answers: list[Prediction] = []
        try:
            self._bind(arena.bind)
            self._mark("begin", number)
            for tasks in run.rounds():
                self._mark("formed", number)
                due = self._dispatch(arena.bind, tasks)
                run.refine(request.callback)  # the states behind, while the workers compute
                self._mark("refined", number)
                answers += self._collect(number, due)
            run.refine(request.callback)
            seconds = time.perf_counter() - began
            self._mark("end", number)
        finally:
            self._release(arena)
        return Result(
            samples=run.state.clone(),
            mode=type(job.mode).__name__.lower(),
            drafts=job.mode.width,
            steps=job.solver.grid.steps,
            devices=tuple(device.name for device in self._devices),
            rounds=run.rounds_done,
            evaluations=len(answers),
            seconds=seconds,
            device_seconds=sum(answer.seconds for answer in answers),
            residuals=run.residuals,
            cuts=tuple(run.cuts),
        )

    def _bind(self, bind: Bind) -> None:
        """Give the workers the run's memory, and wait until all have it: then its owner may let go at any time."""
        for worker in self._pool.workers:
            self._pool.send(worker, bind)
        self._wait(bind.run, {worker.number: worker for worker in self._pool.workers}, self._draft_timeout)

    def _dispatch(self, bind: Bind, tasks: Sequence[Task]) -> dict[Key, WorkerProcess]:
        """Send a round's drafts, to the workers in turn; return who owes which (index, slot)."""
        due: dict[Key, WorkerProcess] = {}
        for task, worker in zip(tasks, itertools.cycle(self._pool.workers)):
            self._pool.send(worker, Draft(bind.run, task.index, task.timestep, task.slot))
            self._mark("sent", bind.run, task.index, worker.number)
            due[task.index, task.slot] = worker
        return due

    def _collect(self, run: int, due: dict[Key, WorkerProcess]) -> list[Prediction]:
        """Wait until no prediction is owed; return them as they arrived."""
        turns = -(-len(due) // len(self._pool.workers))
        return [a for a in self._wait(run, due, turns * self._draft_timeout) if isinstance(a, Prediction)]

    def _wait(self, run: int, due: dict[Key, WorkerProcess], seconds: float) -> list[Bound | Prediction]:
        """Take the answers that are due to a run: each from the worker that owes it, all before the time is up."""
        answers: list[Bound | Prediction] = []
        deadline = time.monotonic() + seconds
        while due:
            key, silent = next(iter(due.items()))
            doing = f"evaluated step {key[0]}" if isinstance(key, tuple) else "taken the memory"
            late = f"{silent} has not {doing} of run {run} within {self._draft_timeout:g} s (draft_timeout)"
            worker, answer = self._pool.receive(deadline, late)
            if not isinstance(answer, (Bound, Prediction)):
                raise WorkerError(f"{worker} sent {type(answer).__name__}, which was not due")
            if answer.run != run:
                continue  # a late answer to a run that was given up
            key = (answer.index, answer.slot) if isinstance(answer, Prediction) else worker.number
            if due.pop(key, None) is not worker:
                raise WorkerError(f"{worker} sent {answer}, which it does not owe")
            if isinstance(answer, Prediction):
                self._mark("answer", run, answer.index, worker.number, answer.seconds)
            answers.append(answer)
        return answers

    def _mark(self, what: What, run: int, step: int = 0, worker: int = 0, seconds: float = 0.0) -> None:
        if self.timeline is not None:
            self.timeline.append(Mark(what, time.perf_counter_ns(), run, step, worker, seconds))

    def _release(self, arena: Arena) -> None:
        """End a run, finished or given up: workers let go of its memory."""
        for worker in self._pool.workers:
            with contextlib.suppress(WorkerError):  # Whoever is gone has let go; the next run will notice.
                self._pool.send(worker, Unbind(arena.bind.run))
        arena.close()

    def close(self) -> None:
        """End the workers and give back all memory; more calls do nothing."""
        with self._alone():
            self._end()

    def __enter__(self) -> Leader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def model_name(model: str | Callable[[], Any]) -> str:
    """Return the name by which a worker can import a factory; raise ValueError if there is none."""
    if isinstance(model, str):
        return model
    module, name = getattr(model, "__module__", None), getattr(model, "__qualname__", None)
    if not module or not name or "<" in name:
        raise ValueError(f"model {model!r} cannot be imported by a worker; define it by name at the top of a module")
    return f"{module}:{name}"
