"""A diffusers pipeline makes the images, in a thread of its own, one order after the other."""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import DiffusionPipeline

from drp.client import RefusedError
from drp.diffusers import Report, parallelize
from drp.http.work import Images, News, Order
from drp.leader.errors import WorkerError
from drp.server.metrics import Counts, prometheus

NAMES: Final = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
"""Options of a run, as pipelines call them."""
MOST: Final = 64
START: Final = 600.0
"""Seconds that a pipeline has to load."""

FACTS: Final = ("mode", "drafts", "steps", "devices", "rounds", "evaluations", "seconds", "theory", "speedup")

log = logging.getLogger(__name__)


class Pipeline:
    """A backend over the pipeline that `factory` makes, its steps spread over devices by `drp.diffusers.parallelize`.

    `spread` are the arguments of that. There are no previews: what a pipeline's latents look like, its decoder alone
    can say. If there is a `trace` among them and all workers are lost, the trace so far is kept beside that of the
    next ones, with `-before` in its name.
    """

    def __init__(self, factory: Callable[[], Any], model: str, spread: Mapping[str, Any], stall: float = 300.0) -> None:
        self.model, self._factory, self._spread, self._stall = model, factory, spread, stall
        self._orders: queue.Queue[PipelineWork | None] = queue.Queue(MOST)
        self._counts, self._lively = Counts(), time.monotonic()
        self._ready: Future[frozenset[str]] = Future()
        self._thread = threading.Thread(target=self._serve, name="drp-pipeline", daemon=True)
        self._thread.start()
        self._known = self._ready.result(START)

    def begin(self, order: Order) -> PipelineWork:
        """Queue an order."""
        arguments: dict[str, Any] = {"prompt": order.prompt, "num_images_per_prompt": order.n}
        arguments |= {NAMES.get(name, name): value for name, value in order.options.items() if name != "seed"}
        if order.size not in (None, "auto"):
            found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", order.size or "")
            if found is None:
                raise ValueError(f"size is {order.size!r}; write width and height, as in '1024x1024'")
            arguments |= {"width": int(found[1]), "height": int(found[2])}
        for name in arguments:
            if name not in self._known:
                raise ValueError(f"{name} is given, which {self.model} does not take; leave it out")
        seed = order.options.get("seed")
        if seed is not None:
            arguments["generator"] = torch.Generator().manual_seed(seed)
        work = PipelineWork(arguments, self._note_progress)
        try:
            self._orders.put_nowait(work)
        except queue.Full:
            self._counts.refused += 1
            raise RefusedError("busy", f"{MOST} orders wait, as many as there may") from None
        return work

    def health(self) -> tuple[bool, Mapping[str, Any]]:
        """Say whether there was progress lately, or nothing to do."""
        still = time.monotonic() - self._lively if self._orders.unfinished_tasks else 0.0
        alive = self._thread.is_alive()
        return alive and still <= self._stall, {"alive": alive, "since_progress": still}

    def metrics(self) -> str:
        """Return what was counted."""
        waiting = {"requests": ("Requests that are not over.", self._orders.unfinished_tasks)}
        return prometheus(self._counts, waiting)

    def close(self) -> None:
        """Cancel what waits and what is under way; wait until the pipeline is let go."""
        while self._thread.is_alive():
            try:
                work = self._orders.get_nowait()
            except queue.Empty:
                break
            if work is not None:
                work.images.set_exception(CancelledError())
            self._orders.task_done()
        self._orders.put(None)
        self._thread.join(30.0)

    def _note_progress(self) -> None:
        self._lively = time.monotonic()

    def _serve(self) -> None:
        try:
            pipe = self._factory()
            pipe.set_progress_bar_config(disable=True)
            while self._serve_with(pipe):
                log.warning("the pipeline has lost a worker; its workers start anew")
                if "trace" in self._spread:
                    trace = Path(self._spread["trace"])
                    trace.replace(trace.with_stem(f"{trace.stem}-before"))
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    def _serve_with(self, pipe: Any) -> bool:
        """Draw until the end; return True if a worker is lost, and all are needed anew."""
        with parallelize(pipe, **self._spread) as run:
            if not self._ready.done():
                self._ready.set_result(frozenset(inspect.signature(pipe.__call__).parameters))
            while (work := self._orders.get()) is not None:
                self._note_progress()
                lost = self._draw(pipe, work, run.report)
                run.report.calls.clear()
                self._orders.task_done()
                if lost:
                    return True
        return False

    def _draw(self, pipe: Any, work: PipelineWork, report: Report) -> bool:
        """Carry an order out; return whether it lost a worker."""
        began = time.monotonic()
        try:
            images = work.draw(pipe, report)
        except CancelledError as error:
            self._counts.cancelled += 1
            work.images.set_exception(error)
        except Exception as error:
            self._counts.failed += 1
            work.images.set_exception(error)
            return isinstance(error, WorkerError)
        else:
            self._counts.finished += 1
            self._counts.request_seconds.add(time.monotonic() - began)
            work.images.set_result(images)
        return False


class PipelineWork:
    """One call of a pipeline."""

    def __init__(self, arguments: dict[str, Any], lively: Callable[[], None]) -> None:
        self.images: Future[Images] = Future()
        self._arguments, self._lively = arguments, lively
        self._news: queue.SimpleQueue[News | None] = queue.SimpleQueue()
        self._unwanted = False
        self.images.add_done_callback(lambda _: self._news.put(None))

    def news(self) -> Iterator[News]:
        """Yield the steps."""
        while (news := self._news.get()) is not None:
            yield news

    def cancel(self) -> None:
        """Let it end with its next step."""
        self._unwanted = True

    def draw(self, pipe: Any, report: Report) -> Images:
        """Call the pipeline; raise CancelledError if nobody wants the images any more."""
        if self._unwanted:
            raise CancelledError

        def step(own: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if self._unwanted:
                raise CancelledError
            self._lively()
            self._news.put(News(index + 1, int(own.num_timesteps)))
            return kwargs

        images = pipe(**self._arguments, callback_on_step_end=step).images
        facts: dict[str, Any] = {}
        if report.calls:
            facts = {name: getattr(report.calls[-1], name) for name in FACTS}
            facts["notes"] = list(report.calls[-1].notes)  # lost workers among them
        return Images([_png(image) for image in images], facts)


def load(name: str, spread: Mapping[str, Any]) -> Pipeline:
    """Return the backend over `package.module:factory`, or over a folder or a hub's name; ValueError if it is none."""
    module, colon, attribute = name.partition(":")
    if not colon:
        return Pipeline(functools.partial(DiffusionPipeline.from_pretrained, name), name, spread)
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name!r} is no pipeline: {error}; write package.module:factory, or a folder") from None
    return Pipeline(factory, name, spread)


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
