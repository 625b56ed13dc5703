"""A request of a client, from Submit until its run is over, and the progress messages for the client."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from torch import Tensor

from drp.leader.runs.submission import RunFuture
from drp.protocol.arrays import add_array
from drp.protocol.client_messages import Evaluation, Progress, Submit, TensorData
from drp.protocol.frames import Frame, FrameWriter
from drp.protocol.memory import SharedMemory

MAX_EVALUATIONS = 10_000

Evaluations = tuple[Evaluation, ...]


class ServerRequest:
    """A client's request.

    `on_step` is called in the leader's thread; all other methods are called in the server's thread, except `on_end`,
    which may be called in either.

    report: called in either thread when there is an update for the client.
    on_progress: called after every step.
    """

    future: RunFuture

    def __init__(
        self, client: bytes, submit: Submit, report: Callable[[ServerRequest], None], on_progress: Callable[[], None]
    ) -> None:
        self.client, self.submit = client, submit
        self.began = time.monotonic()
        self.reported = False
        self.cancelled = False
        """Whether the request was cancelled by its client, or because the client's session ended."""
        self.memory: SharedMemory | None = None
        """The shared memory to which the samples are written, if the client requested it."""
        self._report, self._on_progress = report, on_progress
        self._step = self._last_reported = 0
        self._preview: tuple[int, Tensor | None] = (0, None)
        self._wanted = submit.progress or submit.previews > 0 or submit.timeline

    @property
    def request(self) -> int:
        return self.submit.request

    def cancel(self) -> None:
        """Cancel the run on behalf of the client."""
        self.cancelled = True
        self.future.cancel()

    def release(self) -> None:
        """Free the shared memory, unless it is kept until the client's Ack, and drop the run's future.

        The future refers to this request by its callbacks, and to the samples. Breaking the reference cycle frees them
        immediately.
        """
        self.__dict__.pop("future", None)
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def on_step(self, step: int, state: Tensor) -> None:
        """Record a step, and its state if a preview is due."""
        self._on_progress()
        if self.submit.previews and step % self.submit.previews == 0:
            self._preview = step, state.cpu()
        self._step = step  # Written after the preview and read before it, so that a step's preview is always seen.
        if self._wanted:
            self._report(self)

    def on_end(self, _: object) -> None:
        """Report that the run is over."""
        self._report(self)

    def updates(self, take: Callable[[ServerRequest, int], Evaluations]) -> Iterator[tuple[Progress, list[Frame]]]:
        """Yield progress messages since the last call, with their frames.

        `take(request, most)` returns up to `most` new evaluations of a request.
        """
        step = self._step
        shown, state = self._preview
        if state is not None and shown > self._last_reported:
            frames = FrameWriter()
            preview = add_array(frames, "a preview", state)
            yield self._progress(shown, take(self, MAX_EVALUATIONS), preview), frames.frames
        while (evaluations := take(self, MAX_EVALUATIONS)) or (self._wanted and step > self._last_reported):
            yield self._progress(max(step, self._last_reported), evaluations), []

    def _progress(self, step: int, evaluations: Evaluations, preview: TensorData | None = None) -> Progress:
        self._last_reported = step
        return Progress(self.request, step, self.future.steps, self.future.rounds, preview, evaluations)
