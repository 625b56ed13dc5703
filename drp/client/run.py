"""A run on a server: its future and its progress."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from drp.errors import ProtocolError, RefusedError, WorkerError
from drp.protocol.arrays import Library, open_array, take_array
from drp.protocol.client_messages import Ended, Evaluation, Finished, Progress, Refused
from drp.protocol.frames import Frame, FrameReader
from drp.sampling.result import Result

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """The progress of a run.

    step, steps: the number of finished steps, and of all.
    rounds: the number of rounds so far.
    preview: the state after `step` steps, an array [B, ...] like the samples; None if no preview is due.
    evaluations: the evaluations since the last update, if the timeline was requested.
    """

    step: int
    steps: int
    rounds: int
    preview: Any | None
    evaluations: Sequence[Evaluation]


class RemoteRun(Future[Result[Any]]):
    """A `concurrent.futures.Future` of a `drp.Result`. `cancel` also ends a run that is running.

    library: the library of the arrays of samples and previews.
    """

    def __init__(
        self,
        number: int,
        cancel: Callable[[int], None],
        library: Library,
        on_update: Callable[[Update], None] | None = None,
    ) -> None:
        super().__init__()
        self.number, self._library = number, library
        self._on_update = on_update
        self._cancel = cancel
        self._updates: SimpleQueue[Update | None] = SimpleQueue()
        self.set_running_or_notify_cancel()
        self.add_done_callback(lambda _: self._updates.put(None))

    def cancel(self) -> bool:
        """Request the end of the run, after which `result` raises CancelledError; return False if it has ended."""
        if self.done():
            return False
        self._cancel(self.number)
        return True

    def progress(self) -> Iterator[Update]:
        """Yield updates until the run has ended, without an error if it failed: `result` raises that.

        There are no updates unless `progress`, `previews` or `timeline` was requested. Updates are skipped if steps
        finish faster than they can be sent.
        """
        while (update := self._updates.get()) is not None:
            yield update
        self._updates.put(None)  # for further iterators

    # Called by the connection.

    def on_progress(self, message: Progress, frames: Sequence[Frame]) -> None:
        received = FrameReader(frames)
        preview = take_array(received, message.preview, self._library) if message.preview is not None else None
        received.done()
        update = Update(message.step, message.steps, message.rounds, preview, message.evaluations)
        if self._on_update is None:
            self._updates.put(update)
            return
        try:
            self._on_update(update)
        except Exception:  # The caller's error must not end the thread, which serves all runs.
            log.exception("on_update has raised")

    def on_finished(self, message: Finished, frames: Sequence[Frame]) -> None:
        received, data = FrameReader(frames), message.samples
        try:
            if data.memory is not None:
                samples = open_array(data, self._library)
            else:
                samples = take_array(received, data, self._library)
            received.done()
        except ProtocolError as error:  # For example, the server is in another process namespace of this host.
            self.set_exception(error)
            return
        self.set_result(
            Result(
                samples=samples,
                mode=message.mode,
                drafts=message.drafts,
                steps=message.steps,
                devices=message.devices,
                rounds=message.rounds,
                evaluations=message.evaluations,
                seconds=message.seconds,
                device_seconds=message.device_seconds,
                residuals={each.index: math.inf if each.value is None else each.value for each in message.residuals},
                cuts=message.cuts,
                evaluated=message.evaluated,
                incidents=message.incidents,
            )
        )

    def on_error(self, message: Refused | Ended) -> None:
        """Set the error of a run that was refused or has failed."""
        match message:
            case Ended(code="cancelled"):
                self.set_exception(CancelledError())
            case Ended(code="failed"):
                self.set_exception(WorkerError(message.reason))
            case Refused(code="invalid"):
                self.set_exception(ValueError(message.reason))
            case Refused(code="protocol"):
                self.set_exception(ProtocolError(message.reason))
            case _:
                self.set_exception(RefusedError(message.code, message.reason))
