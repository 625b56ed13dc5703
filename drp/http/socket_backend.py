"""A backend over a drp server whose model has classes, such as `digits`."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from drp.client import Client, RemoteRun, Update
from drp.errors import ProtocolError
from drp.http.jobs import RUN_FACTS, ImageRequest, Images, Previews, ProgressEvent, Report, check_work
from drp.pictures import encode_grid
from drp.sampling.result import Result

SCALE = 1
MAX_WIDTH = 16_384
"""Maximum width of an image in pixels; the width depends on the prompt."""
STEPS = 48
"""The default number of steps."""
FIRST_TIMEOUT, RECONNECT_TIMEOUT = 10.0, 1.0
"""Seconds within which a server must answer at the first connection and at later ones."""


class SocketBackend:
    """A backend over a `drp.Client`.

    The prompt consists of classes, one digit each if there are at most ten, else numbers separated by spaces. An image
    shows the classes of the prompt in a row.

    connect: returns a client, given a timeout in seconds; called again when the connection was lost.
    max_work: the maximum of pixels times steps of one request.

    Raises ValueError for a model without classes or whose samples are not pictures.
    """

    def __init__(self, connect: Callable[[float], Client], max_work: float = 1e9) -> None:
        self._connect, self._gate, self._max_work = connect, threading.Lock(), max_work
        self._held = connect(FIRST_TIMEOUT)
        spec, self.model = self._held.spec, self._held.model
        shape = spec.sample_shape or ()
        if spec.classes is None or len(shape) != 3 or shape[0] not in (1, 3):
            self.close()
            raise ValueError(
                f"{self.model} is served, with {spec}; images need a model with classes and pictures, as digits is"
            )
        self._classes, self._shape = spec.classes, shape

    @property
    def _client(self) -> Client:
        with self._gate:
            if self._held.closed:
                self._held = self._connect(RECONNECT_TIMEOUT)
            return self._held

    def begin(self, request: ImageRequest, report: Report | None = None) -> SocketJob:
        pattern = r"[0-9]" if self._classes <= 10 else r"[0-9]+"
        labels = [int(found) for found in re.findall(pattern, request.prompt)]
        if not labels or re.sub(pattern, "", request.prompt).strip(" ,"):
            raise ValueError(
                f"prompt is {request.prompt!r:.80}; {self.model} draws the numbers that it names, 0 to "
                f"{self._classes - 1}: write digits, as in '314'"
            )
        if "negative_prompt" in request.options:
            raise ValueError(f"negative_prompt is given, which {self.model} does not take; leave it out")
        _, height, width = self._shape
        width *= len(labels)
        if width > MAX_WIDTH:
            raise ValueError(f"prompt names {len(labels)} digits, {width} pixels; at most {MAX_WIDTH}: ask for fewer")
        if request.size not in (None, "auto", f"{width}x{height}"):
            raise ValueError(
                f"size is {request.size!r:.80}, but this prompt makes an image of {width}x{height}; give that, or "
                "leave size out"
            )
        steps = int(request.options.get("steps", STEPS))
        check_work(request.n, width, height, steps, self._max_work)
        client = self._client
        previews = request.previews if report is not None else 0
        on_update = (
            partial(_report, report, Previews(previews), len(labels), client.devices) if report is not None else None
        )
        run = client.submit(
            labels=labels * request.n,
            progress=report is not None,
            previews=max(1, steps // (previews + 1)) if previews else 0,
            timeline=request.timeline,
            on_update=on_update,
            **request.options,
        )
        return SocketJob(run, len(labels))

    def health(self) -> tuple[bool, Mapping[str, Any]]:
        status = self._client.status()
        return status.healthy, vars(status)

    def metrics(self) -> str:
        return self._client.metrics()

    def close(self) -> None:
        self._held.close()


def _report(report: Report, previews: Previews, columns: int, devices: tuple[str, ...], update: Update) -> None:
    evaluations = [vars(each) for each in update.evaluations]
    facts = {"rounds": update.rounds, "evaluations": evaluations, "devices": devices}
    preview = None
    if update.preview is not None and previews.is_due(update.step, update.steps):
        preview = partial(encode_grid, update.preview[:columns], columns, SCALE, 0)
    report(ProgressEvent(update.step, update.steps, preview, facts))


class SocketJob:
    """A run whose samples are shown side by side, `columns` per image."""

    def __init__(self, run: RemoteRun, columns: int) -> None:
        self._run, self._columns = run, columns
        self.images: Future[Images] = Future()
        run.add_done_callback(self._finish)

    def cancel(self) -> None:
        self._run.cancel()

    def _finish(self, run: Future[Result]) -> None:
        error = run.exception()
        if error is not None:
            # The request did not fit into a message, for example because it has too many labels: an invalid request.
            self.images.set_exception(ValueError(str(error)) if isinstance(error, ProtocolError) else error)
            return
        result = run.result()
        rows = np.split(result.samples, len(result.samples) // self._columns)
        pngs = [encode_grid(row, self._columns, SCALE, 0) for row in rows]
        self.images.set_result(Images(pngs, {name: getattr(result, name) for name in (*RUN_FACTS, "incidents")}))
