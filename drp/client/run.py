"""RemoteRun: a run on the server, as its caller holds it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from drp.client.arrays import Library, open_array, take_array
from drp.errors import ProtocolError, RefusedError, WorkerError
from drp.protocol.client_messages import Ended, Evaluation, Finished, Progress, Refused
from drp.protocol.frames import Frame, FrameReader
from drp.sampling.result import Result

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """How far a run is. `preview` is the state, an array [B, ...] like the samples, after `step` of `steps`, if due.

    `rounds` are the evaluations that had to follow one another so far; `evaluations` what was evaluated where since the
    last update, if the timeline was asked for.
    """

    step: int
    steps: int
    rounds: int
    preview: Any | None
    evaluations: Sequence[Evaluation]


class RemoteRun(Future[Result[Any]]):
    """A `concurrent.futures.Future` with a `drp.Result`; `cancel` also ends a run that is under way.

    library: whose arrays samples and previews are.
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
        """Ask for the end of the run, after which `result` raises CancelledError; return False if it is over."""
        if self.done():
            return False
        self._cancel(self.number)
        return True

    def progress(self) -> Iterator[Update]:
        """Yield updates as they come, until the run is over; what it came to, `result` says.

        There are none unless `progress`, `previews` or `timeline` was asked for. When steps are done faster than they
        can be told, some are left out.
        """
        while (update := self._updates.get()) is not None:
            yield update
        self._updates.put(None)  # for whoever asks again

    # What the line does with it.

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
        except Exception:  # It is the caller's, and this thread is all runs'.
            log.exception("on_update has raised")

    def on_finished(self, message: Finished, frames: Sequence[Frame]) -> None:
        received, data = FrameReader(frames), message.samples
        try:
            if data.memory is not None:
                samples = open_array(data, self._library)
            else:
                samples = take_array(received, data, self._library)
            received.done()
        except ProtocolError as error:  # such as a server on this host, but where its processes cannot be seen
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
        """Learn that there will be no samples."""
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
