"""The queue of new runs and sessions from other threads, and how they wake the engine."""

from __future__ import annotations

import os
import threading
from collections import deque

from drp.errors import WorkerError
from drp.leader.request import Job, Request
from drp.leader.runs.run_state import RunFuture
from drp.leader.runs.session import Session

NewWork = tuple[Job, Request, RunFuture] | Session


class RequestQueue:
    """Runs and sessions that are to begin, sessions that have more to do, and whether it is time to end.

    `put`, `poke`, `wake` and `close` are for any thread of the process that made it, the rest for the engine's.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self.new: deque[NewWork] = deque()
        self.notified: deque[Session] = deque()
        self.closing: float | None = None
        """Seconds that workers are given to end, once it was closed."""
        self.wakeup_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lost: WorkerError | None = None
        self._gate = threading.Lock()

    @property
    def is_forked_copy(self) -> bool:
        """Whether this process was forked from the one that has the engine's thread, and the workers."""
        return os.getpid() != self._owner

    def put(self, what: NewWork) -> None:
        """Ask for a run or a session; raise RuntimeError if it was closed, WorkerError if no worker was left."""
        if self.is_forked_copy:
            raise RuntimeError(
                f"this leader is process {self._owner}'s, which this one was forked from; make a new one"
            )
        with self._gate:
            if self._lost is not None:
                raise WorkerError(f"this leader is closed; make a new one: {self._lost}")
            if self.closing is not None:
                raise RuntimeError("this leader is closed; make a new one")
            self.new.append(what)
        self.wake()

    def notify(self, session: Session) -> None:
        """Say that a session has something to do."""
        self.notified.append(session)
        self.wake()

    def close(self, grace: float) -> None:
        """Ask for the end; the first to ask says how long workers have."""
        with self._gate:
            if self.closing is None:
                self.closing = grace
        self.wake()

    def wake(self) -> None:
        """Have the engine look, if it is still there."""
        with self._gate:
            if self.wakeup_fd >= 0:
                os.eventfd_write(self.wakeup_fd, 1)

    def reject_new(self, error: WorkerError | None) -> float:
        """Take nothing more, because it was closed or for an error; return the seconds that workers have to end."""
        with self._gate:
            self._lost = error
            self.closing = 0.0 if error or self.closing is None else self.closing
            return self.closing

    def close_descriptor(self) -> None:
        """Close the descriptor: its number may be another file's at once, and nobody may write to it any more."""
        with self._gate:
            os.close(self.wakeup_fd)
            self.wakeup_fd = -1
