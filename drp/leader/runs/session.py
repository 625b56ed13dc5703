"""Evaluation sessions, for callers with their own sampling loop, such as a diffusers pipeline."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from typing import Protocol

from drp.leader.runs.run_state import RunState
from drp.protocol.arena import Arena
from drp.protocol.messages import Bind
from drp.sampling.run import Task


class EvaluationBlock:
    """Evaluations requested by one call. `rows` has, by draft index, the row of each prediction."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks)
        self.rows: dict[int, int] = {}
        self.done: Future[dict[int, int]] = Future()


class EngineNotifier(Protocol):
    """How a session reaches the engine from its caller's thread."""

    @property
    def is_forked_copy(self) -> bool:
        """Whether this process was forked from the one that has the engine."""
        ...

    def notify(self, session: EvaluationSession) -> None:
        """Notify the engine that a session has new evaluations or was closed."""
        ...


class EvaluationSession(RunState):
    """An arena that all workers open, in which blocks of drafts are evaluated, one block at a time.

    The caller writes drafts to `arena.drafts`, calls `evaluate` in its own thread, and reads the predictions from the
    rows that are returned. On a GPU it does so on its current stream, which the workers wait for by the memory's event.
    The engine handles lost workers and timeouts as for runs. `close` ends the session.
    """

    def __init__(self, number: int, arena: Arena, engine: EngineNotifier, batch: int) -> None:
        super().__init__(number, arena, batch)
        self._engine = engine
        self.arena.memory.record_event()  # The conditions were copied by this thread, which is the caller's.
        self._gate = threading.Lock()
        self._blocks: deque[EvaluationBlock] = deque()
        self._block: EvaluationBlock | None = None
        self._kept: set[int] = set()
        self._closed = False
        self._finished: Future[None] = Future()

    # Called by the caller.

    def evaluate(self, tasks: Sequence[Task]) -> dict[int, int]:
        """Evaluate the drafts in the tasks' slots; each index may occur once.

        Returns:
            By index, the row of the prediction in `arena.predictions`. The rows are valid until the next call.

        Raises WorkerError if a worker raised or none is left, RuntimeError if the session is closed.
        """
        indices = {task.index for task in tasks}
        if not tasks or len(indices) < len(tasks):
            raise ValueError(f"{len(tasks)} tasks with {len(indices)} different indices; give one or more, each once")
        if self._engine.is_forked_copy:  # It has neither the engine's thread nor, on a GPU, a CUDA context.
            raise RuntimeError("this session belongs to the process that this one was forked from")
        block = EvaluationBlock(tasks)
        self.arena.memory.record_event()
        with self._gate:
            if self._closed:
                raise RuntimeError("this session is closed; open another")
            self._blocks.append(block)
        self._engine.notify(self)
        return block.done.result()

    def close(self) -> None:
        """End the session and release its memory, which must not be used any more. Further calls do nothing."""
        if self._engine.is_forked_copy:
            return
        with self._gate:
            if not self._closed:
                self.arena.memory.record_event()  # The next session in this memory waits for what was read of it.
            self._closed = True
        self._engine.notify(self)
        self._finished.result()

    # Called by the engine.

    def bind(self, worker: int) -> Bind:
        return self.arena.bind

    def prepare_dispatch(self) -> tuple[int, int]:
        """Do nothing: the caller has recorded the memory's event, on its own stream."""
        return 0, 0

    @property
    def cancel_requested(self) -> bool:
        return self._closed

    @property
    def idle(self) -> bool:  # type: ignore[override]  # it changes, as it does not for runs
        """Whether no block is being evaluated."""
        return self._block is None

    def schedule_drafts(self) -> bool | None:
        """Return the finished block to its caller, and schedule the next block if there is one."""
        with self._gate:
            finished, self._block = self._block, None
            if finished is not None:
                finished.done.set_result(finished.rows)
            if not self._blocks:
                return None
            self._block = self._blocks.popleft()
            self._kept.clear()
        self._queue_drafts(self._block.tasks)
        return True

    @property
    def ready(self) -> bool:
        return not self.outstanding

    def rows_in_use(self) -> set[int]:
        return self._kept

    def add_prediction(self, task: Task, row: int) -> None:
        assert self._block is not None
        self._kept.add(row)
        self._block.rows[task.index] = row

    def refine(self) -> None:
        """Do nothing, since the caller computes the states."""

    def finish(self, error: BaseException | None, devices: tuple[str, ...]) -> None:
        """Resolve the futures of all blocks, and let `close` return."""
        with self._gate:
            self._closed = True
            blocks = [*([self._block] if self._block else []), *self._blocks]
            self._block = None
            self._blocks.clear()
        for block in blocks:
            block.done.set_exception(error or CancelledError("the session was closed"))
        if not self._finished.done():
            self._finished.set_result(None)
