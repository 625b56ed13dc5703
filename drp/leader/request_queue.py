"""The queue of new runs and sessions from other threads, and how they wake the engine."""

from __future__ import annotations

import os
import threading
from collections import deque

from drp.errors import WorkerError
from drp.leader.runs.session import EvaluationSession
from drp.leader.runs.submission import Submission

NewWork = Submission | EvaluationSession


class RequestQueue:
    """Runs and sessions to start, sessions with new evaluations, and whether the engine is to close.

    `put`, `notify`, `wake` and `close` may be called from any thread of the process that created the queue. The other
    methods are for the engine's thread only.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self.new: deque[NewWork] = deque()
        self.notified: deque[EvaluationSession] = deque()
        self.closing: float | None = None
        """Seconds that workers have to end; None until the queue is closed."""
        self.wakeup_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lost: WorkerError | None = None
        self._gate = threading.Lock()

    @property
    def is_forked_copy(self) -> bool:
        """Whether this process was forked from the one that owns the engine's thread and the workers."""
        return os.getpid() != self._owner

    def put(self, work: NewWork) -> None:
        """Queue a run or a session. Raises RuntimeError if the queue is closed, WorkerError if no worker is left."""
        if self.is_forked_copy:
            raise RuntimeError(
                f"this leader is process {self._owner}'s, which this one was forked from; make a new one"
            )
        with self._gate:
            if self._lost is not None:
                raise WorkerError(f"this leader is closed; make a new one: {self._lost}")
            if self.closing is not None:
                raise RuntimeError("this leader is closed; make a new one")
            self.new.append(work)
        self.wake()

    def notify(self, session: EvaluationSession) -> None:
        """Notify the engine, unless it has ended, that a session has new evaluations or was closed."""
        with self._gate:
            if self.wakeup_fd >= 0:
                self.notified.append(session)
                os.eventfd_write(self.wakeup_fd, 1)

    def close(self, grace: float) -> None:
        """Request the engine to close. Only the `grace` of the first call counts, in seconds."""
        with self._gate:
            if self.closing is None:
                self.closing = grace
        self.wake()

    def wake(self) -> None:
        """Wake the engine's thread; does nothing once the descriptor is closed."""
        with self._gate:
            if self.wakeup_fd >= 0:
                os.eventfd_write(self.wakeup_fd, 1)

    def reject_new(self, error: WorkerError | None) -> float:
        """Reject all further requests and return the seconds that workers have to end.

        Args:
            error: why the engine ended, None if it was closed.
        """
        with self._gate:
            self._lost = error
            self.closing = 0.0 if error or self.closing is None else self.closing
            return self.closing

    def close_descriptor(self) -> None:
        """Close the descriptor. Its number may be reused at once, so `wake` must not write to it afterwards.

        Sessions are forgotten: a closed leader that the program keeps must not keep their memory mapped.
        """
        with self._gate:
            self.notified.clear()
            os.close(self.wakeup_fd)
            self.wakeup_fd = -1
