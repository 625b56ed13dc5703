"""Synchronous runs, which wait for each prediction before they send the drafts that are made of it."""

from __future__ import annotations

import time

from torch import Tensor

from drp.leader.runs.run_state import RunState
from drp.leader.runs.submission import RunConfig, Submission
from drp.nvtx import annotate, annotate_methods
from drp.protocol.arena import Allocate, Arena
from drp.sampling.result import Result
from drp.sampling.run import Run, Task


class SyncRun(RunState):
    """A run with synchronous dispatch: its arithmetic, and the future that its caller holds."""

    def __init__(
        self,
        submission: Submission,
        config: RunConfig,
        allocate: Allocate | None = None,
        extra_nbytes: int = 0,
        slots: int | None = None,
    ) -> None:
        self._began, job = time.perf_counter(), submission.job
        slots = slots or job.slots(checkpoints=False)
        arena = Arena.create(
            config.number,
            job.start,
            slots,
            slots + config.spare_rows,
            job.cond,
            allocate or config.placement.allocate,
            extra_nbytes,
        )
        super().__init__(config.number, arena, config.batch)
        self._dispatch, self.future, self._callback = config.dispatch, submission.future, submission.callback
        self.job = job.to(arena.memory.device)
        self.future.number, self.future.steps = config.number, job.solver.grid.steps
        if config.placement.nvtx:
            self._annotate_nvtx()
        self._begin()

    def _begin(self) -> None:
        self.run = self._make_run()
        self.cuts = self.run.cuts
        self._rounds = self.run.rounds()

    def _make_run(self) -> Run:
        return self.job.run(self.arena.drafts, self.arena.predictions)

    @property
    def cancel_requested(self) -> bool:
        return self.future.cancel_requested

    def _annotate_nvtx(self) -> None:
        """Annotate this run's work with NVTX ranges."""
        annotate_methods(self, schedule_drafts="drp draft", refine="drp refine")
        if self._callback is not None:
            self._callback = annotate("drp callback", self._callback)

    def schedule_drafts(self) -> bool | None:
        self.needs_refine = True
        while self.run.ready:
            tasks = next(self._rounds, None)
            if tasks is None:
                return False
            self._queue_drafts(tasks)
        return True

    @property
    def ready(self) -> bool:
        return self.run.ready

    def rows_in_use(self) -> set[int]:
        return self.run.rows

    def add_prediction(self, task: Task, row: int) -> None:
        self.run.accumulate(task.slot, row)

    def refine(self) -> None:
        """Compute the states that the last round has made final, and call the callback for each."""
        self.needs_refine = False
        self.future.rounds = self.run.rounds_done
        self.run.refine(self._on_state if self._callback else None)
        self.steps_done = self.run.steps_done

    def _on_state(self, step: int, state: Tensor) -> None:
        """Call the callback with a copy of the state, since it may write to it and the run continues from the state."""
        self._call_back(step, state.clone())

    def _call_back(self, step: int, state: Tensor) -> None:
        assert self._callback is not None
        since = time.perf_counter_ns()
        self._callback(step, state)
        if self.callback_recorder is not None:
            self.callback_recorder(step, since)

    def finish(self, error: BaseException | None, devices: tuple[str, ...]) -> None:
        """Resolve the future with the error if there is one, else with the result or the error that prevented it."""
        if error is None:
            try:
                result = self._result(devices)
            except BaseException as own:  # For example, the caller has resized `out` in the meantime.
                error = own
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)

    def _result(self, devices: tuple[str, ...]) -> Result:
        seconds = time.perf_counter() - self._began
        return Result(
            samples=self.job.samples(self.run.state),
            mode=self.job.mode.name,
            drafts=self.job.mode.width,
            steps=self.job.solver.grid.steps,
            devices=devices,
            dispatch=self._dispatch,
            rounds=self.run.rounds_done,
            evaluations=self.evaluations,
            seconds=seconds,
            device_seconds=self.device_seconds,
            residuals=self.run.residuals,
            cuts=tuple(self.run.cuts),
            evaluated=tuple(self.run.evaluated),
            incidents=tuple(self.incidents),
        )
