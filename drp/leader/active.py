"""Active: one run while it is under way, and the future that its caller holds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from drp.leader.request import Job, Request
from drp.protocol.arena import Arena
from drp.protocol.messages import Prediction
from drp.sampling.result import Result
from drp.sampling.run import Task


class Pending(Future[Result]):
    """A run that was submitted: a `concurrent.futures.Future` whose `cancel` also ends a run that is under way.

    `number` is its own in the timeline, `steps` those of its grid; both from when it begins. `rounds` are those done.
    """

    number: int | None = None
    steps = 0
    rounds = 0

    def __init__(self, wake: Callable[[], None]) -> None:
        super().__init__()
        self._wake = wake
        self.unwanted = False

    def cancel(self) -> bool:
        """Ask for the end of the run, after which `result` raises CancelledError; return False if it is over already.

        It ends within a round; its workers are free for other runs as soon as they have answered.
        """
        over = self.done()
        self.unwanted = True
        if not over:
            self._wake()
        return not over


class Active:
    """One run's arithmetic, memory and accounts. `waiting` are the drafts formed but not given to any worker."""

    def __init__(self, number: int, job: Job, request: Request, pending: Pending) -> None:
        self.began = time.perf_counter()
        self.number, self.job, self.pending = number, job, pending
        pending.number, pending.steps = number, job.solver.grid.steps
        self.arena = Arena.create(number, job.start, job.slots, job.cond)
        self.run = job.run(self.arena.drafts, self.arena.predictions)
        self.waiting: deque[Task] = deque()
        self.due: set[tuple[int, int]] = set()
        """(index, slot) of the drafts that workers have."""
        self.unbound: set[int] = set()
        """Numbers of the workers that have not answered Bind: until then the memory's descriptor stays open."""
        self.behind = False
        """States are to be refined, callbacks to be called."""
        self._callback = request.callback
        self._rounds = self.run.rounds()
        self._evaluations = 0
        self._device_seconds = 0.0

    def form(self) -> bool:
        """Form all drafts whose predictions are in; return False if there is none left: it is over but for `refine`."""
        self.behind = True
        while self.run.ready:
            tasks = next(self._rounds, None)
            if tasks is None:
                return False
            self.waiting.extend(tasks)
        return True

    def answer(self, prediction: Prediction) -> bool:
        """Account for a prediction and fold it in; return whether there are drafts to form, or nothing is left."""
        self.due.remove((prediction.index, prediction.slot))
        self._evaluations += 1
        self._device_seconds += prediction.seconds
        self.run.fold(prediction.slot)
        return self.run.ready

    def refine(self) -> None:
        """Compute the states that the last round has passed, and call the callback for each."""
        self.behind = False
        self.pending.rounds = self.run.rounds_done
        self.run.refine(self._callback)

    def result(self, devices: tuple[str, ...]) -> Result:
        """Return the finished run's result."""
        seconds = time.perf_counter() - self.began
        return Result(
            samples=self.job.samples(self.run.state),
            mode=type(self.job.mode).__name__.lower(),
            drafts=self.job.mode.width,
            steps=self.job.solver.grid.steps,
            devices=devices,
            rounds=self.run.rounds_done,
            evaluations=self._evaluations,
            seconds=seconds,
            device_seconds=self._device_seconds,
            residuals=self.run.residuals,
            cuts=tuple(self.run.cuts),
        )
