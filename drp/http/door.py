"""A server behind the door makes the images: a model whose classes are what is drawn, such as `digits`."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from drp.client import Client, RemoteRun
from drp.http.work import Images, News, Order
from drp.pictures import encode_grid
from drp.sampling.result import Result

SCALE = 1
START, AGAIN = 10.0, 1.0
"""Seconds that a server has to answer: at first, and when it was away."""


class Door:
    """A backend over a `drp.Client` that `connect` makes within so many seconds, and again when the server was away.

    The prompt names classes, one digit each if there are at most ten, else numbers with spaces between. An image shows
    the classes of the prompt in a row. Raises ValueError for a model that has no classes, or no pictures.
    """

    def __init__(self, connect: Callable[[float], Client]) -> None:
        self._connect, self._gate = connect, threading.Lock()
        self._held = connect(START)
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
                self._held = self._connect(AGAIN)
            return self._held

    def begin(self, order: Order) -> Drawing:
        """Submit a run."""
        pattern = r"\d" if self._classes <= 10 else r"\d+"
        labels = [int(found) for found in re.findall(pattern, order.prompt)]
        if not labels or re.sub(pattern, "", order.prompt).strip(" ,"):
            raise ValueError(
                f"prompt is {order.prompt!r:.80}; {self.model} draws the numbers that it names, 0 to "
                f"{self._classes - 1}: write digits, as in '314'"
            )
        _, height, width = self._shape
        own = f"{width * len(labels)}x{height}"
        if order.size not in (None, "auto", own):
            raise ValueError(f"size is {order.size!r}; {len(labels)} digits of {self.model} are {own}, or leave it out")
        steps = int(order.options.get("steps", 48))
        client = self._client
        run = client.submit(
            labels=labels * order.n,
            progress=True,
            previews=max(1, math.ceil(steps / order.previews)) if order.previews else 0,
            timeline=order.timeline,
            **order.options,
        )
        return Drawing(run, len(labels), client.devices)

    def health(self) -> tuple[bool, Mapping[str, Any]]:
        """Ask the server."""
        status = self._client.status()
        return status.healthy, vars(status)

    def metrics(self) -> str:
        """Ask the server."""
        return self._client.metrics()

    def close(self) -> None:
        """Close the client."""
        self._held.close()


class Drawing:
    """A run whose samples lie side by side, `columns` in an image."""

    def __init__(self, run: RemoteRun, columns: int, devices: tuple[str, ...]) -> None:
        self._run, self._columns, self._devices = run, columns, devices
        self.images: Future[Images] = Future()
        run.add_done_callback(self._finish)

    def news(self) -> Iterator[News]:
        """Yield the run's updates."""
        for update in self._run.progress():
            evaluations = [vars(each) for each in update.evaluations]
            facts = {"rounds": update.rounds, "evaluations": evaluations, "devices": self._devices}
            preview = None if update.preview is None else self._png(update.preview[: self._columns])
            yield News(update.step, update.steps, preview, facts)

    def cancel(self) -> None:
        """End the run."""
        self._run.cancel()

    def _png(self, samples: Tensor) -> bytes:
        return encode_grid(samples, self._columns, SCALE, 0)

    def _finish(self, run: Future[Result]) -> None:
        error = run.exception()
        if error is not None:
            self.images.set_exception(error)
            return
        result = run.result()
        pngs = [self._png(samples) for samples in torch.split(result.samples, self._columns)]
        names = (
            "mode",
            "drafts",
            "steps",
            "devices",
            "rounds",
            "evaluations",
            "seconds",
            "theory",
            "speedup",
            "incidents",
        )
        self.images.set_result(Images(pngs, {name: getattr(result, name) for name in names}))
