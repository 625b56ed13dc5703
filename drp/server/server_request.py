"""One request, from Submit until its run is over, and the messages due to its client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from torch import Tensor

from drp.leader.runs.run_state import RunFuture
from drp.protocol.client_messages import Evaluation, Progress, Submit, TensorData
from drp.protocol.frames import Frame
from drp.protocol.memory import SharedMemory
from drp.protocol.tensors import Frames

MAX_EVALUATIONS = 10_000

Evaluations = tuple[Evaluation, ...]


class ServerRequest:
    """`on_step` is called in the leader's thread, everything else in the server's.

    `report` is called in either when there is something to tell; `lively` whenever a step was done.
    """

    future: RunFuture

    def __init__(
        self, client: bytes, submit: Submit, report: Callable[[ServerRequest], None], lively: Callable[[], None]
    ) -> None:
        self.client, self.submit = client, submit
        self.began = time.monotonic()
        self.reported = False
        self.cancelled = False
        """By its client, or because that is gone."""
        self.memory: SharedMemory | None = None
        """That the samples are written into, if they are to be shared."""
        self._report, self._on_progress = report, lively
        self._step = self._last_reported = 0
        self._preview: tuple[int, Tensor | None] = (0, None)
        self._wanted = submit.progress or submit.previews > 0 or submit.timeline

    @property
    def request(self) -> int:
        """The client's number for it."""
        return self.submit.request

    def cancel(self) -> None:
        """End the run: its client does not want it any more."""
        self.cancelled = True
        self.future.cancel()

    def release(self) -> None:
        """Give back the memory, if nobody else has it in keeping by now, and let go of the run.

        That holds this ticket by its callbacks, and the samples: without a circle they go at once.
        """
        self.__dict__.pop("future", None)
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def on_step(self, step: int, state: Tensor) -> None:
        """Note a step, and its state if it is to be shown."""
        self._on_progress()
        if self.submit.previews and step % self.submit.previews == 0:
            self._preview = step, state.cpu()
        self._step = step  # after the preview, and read before it: whoever sees the step sees its preview
        if self._wanted:
            self._report(self)

    def on_end(self, _: object) -> None:
        """Note that the run is over."""
        self._report(self)

    def updates(self, take: Callable[[ServerRequest, int], Evaluations]) -> Iterator[tuple[Progress, list[Frame]]]:
        """Yield what is new since it was asked last; `take` returns so many evaluations, at most."""
        step = self._step
        shown, state = self._preview
        if state is not None and shown > self._last_reported:
            frames = Frames()
            preview = frames.add(state)
            yield self._progress(shown, take(self, MAX_EVALUATIONS), preview), frames.frames
        while (evaluations := take(self, MAX_EVALUATIONS)) or (self._wanted and step > self._last_reported):
            yield self._progress(max(step, self._last_reported), evaluations), []

    def _progress(self, step: int, evaluations: Evaluations, preview: TensorData | None = None) -> Progress:
        self._last_reported = step
        return Progress(self.request, step, self.future.steps, self.future.rounds, preview, evaluations)
