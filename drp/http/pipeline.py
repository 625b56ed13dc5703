"""A backend over a diffusers pipeline, which serves one request after another in a separate thread."""

from __future__ import annotations

import inspect
import io
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, Final

import torch

from drp.diffusers import Report as Calls
from drp.diffusers import parallelize
from drp.diffusers.devices import move_to_gpu
from drp.errors import RefusedError, WorkerError
from drp.http.jobs import RUN_FACTS, ImageRequest, Images, Previews, ProgressEvent, Report, check_work
from drp.http.previews import decoder
from drp.limits import MAX_STEPS
from drp.pipelines import load_pipeline
from drp.server.metrics import Counts, prometheus

NAMES: Final = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
"""The pipelines' names of options of a run."""
MAX_SIDE: Final = 16_384
"""Maximum width and height of an image in pixels."""
LOAD_TIMEOUT: Final = 600.0
"""Seconds within which a pipeline must be loaded."""

log = logging.getLogger(__name__)


class PipelineBackend:
    """A backend over the pipeline that `factory` returns, parallelized by `drp.diffusers.parallelize`.

    parallelize_options: the arguments of `parallelize`. If it has a `trace` and the workers have to be restarted, the
        trace so far is kept with `-before` in its name.
    max_work: the maximum of pixels times steps of one request.
    max_queue: the maximum number of waiting requests.
    stall: seconds without progress after which the backend reports itself unhealthy.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        model: str,
        parallelize_options: Mapping[str, Any],
        max_work: float = 1e9,
        max_queue: int = 64,
        stall: float = 300.0,
    ) -> None:
        if max_queue < 1 or not max_work >= 1:
            raise ValueError(f"max_queue is {max_queue} and max_work {max_work}; give numbers from 1")
        self.model, self._factory, self._parallelize_options, self._stall = model, factory, parallelize_options, stall
        self._max_work, self._max_queue = max_work, max_queue
        self._waiting: deque[PipelineJob] = deque()
        self._current: PipelineJob | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._counts, self._last_progress = Counts(), time.monotonic()
        self._ready: Future[dict[str, Any]] = Future()
        self._thread = threading.Thread(target=self._serve, name="drp-pipeline", daemon=True)
        self._thread.start()
        self._known = self._ready.result(LOAD_TIMEOUT)

    def begin(self, request: ImageRequest, report: Report | None = None) -> PipelineJob:
        arguments: dict[str, Any] = {"prompt": request.prompt, "num_images_per_prompt": request.n}
        arguments |= {NAMES.get(name, name): value for name, value in request.options.items() if name != "seed"}
        if request.size not in (None, "auto"):
            found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", request.size or "")
            sides = (int(found[1]), int(found[2])) if found is not None else (0, 0)
            if not 1 <= min(sides) <= max(sides) <= MAX_SIDE:
                raise ValueError(
                    f"size is {request.size!r:.80}; write width and height, as in '1024x1024', at most {MAX_SIDE} each"
                )
            arguments |= {"width": sides[0], "height": sides[1]}
        for name in arguments:
            if name not in self._known:
                raise ValueError(f"{name} is given, which {self.model} does not take; leave it out")
        known = self._known | arguments
        check_work(
            request.n, known["width"], known["height"], known["num_inference_steps"] or MAX_STEPS, self._max_work
        )
        seed = request.options.get("seed")
        if seed is not None:
            arguments["generator"] = torch.Generator().manual_seed(seed)
        work = PipelineJob(arguments, request.previews, report, self._note_progress, self._withdraw)
        with self._changed:
            ahead = len(self._waiting) + (self._current is not None)
            if self._closing or len(self._waiting) >= self._max_queue:
                self._counts.refused += 1
                why = "it is about to end" if self._closing else f"{ahead} requests are open, as many as there may be"
                raise RefusedError("draining" if self._closing else "busy", why)
            if not ahead:
                self._note_progress()
            self._waiting.append(work)
            self._changed.notify()
        if report is not None:
            report(ProgressEvent(0, 0, None, {"ahead": ahead}))
        return work

    def health(self) -> tuple[bool, Mapping[str, Any]]:
        unfinished = self._unfinished()
        still = time.monotonic() - self._last_progress if unfinished else 0.0
        alive = self._thread.is_alive()
        return alive and still <= self._stall, {"alive": alive, "requests": unfinished, "since_progress": still}

    def metrics(self) -> str:
        return prometheus(self._counts, {"requests": ("Current requests, including waiting ones.", self._unfinished())})

    def close(self) -> None:
        with self._changed:
            self._closing = True
            unfinished = [*self._waiting, *([self._current] if self._current is not None else [])]
            self._changed.notify()
        for work in unfinished:
            work.cancel()
        self._thread.join(30.0)

    def _unfinished(self) -> int:
        return len(self._waiting) + (self._current is not None)

    def _withdraw(self, work: PipelineJob) -> bool:
        """Remove a request from the queue; return whether it was waiting there."""
        with self._changed:
            if work not in self._waiting:
                return False
            self._waiting.remove(work)
            self._counts.cancelled += 1
            return True

    def _next(self) -> PipelineJob | None:
        with self._changed:
            self._current = None
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                return None
            self._current = self._waiting.popleft()
            return self._current

    def _note_progress(self) -> None:
        self._last_progress = time.monotonic()

    def _serve(self) -> None:
        try:
            pipe = self._factory()
            pipe.set_progress_bar_config(disable=True)
            while self._serve_with(pipe):
                log.warning("the pipeline has lost a worker; its workers start anew")
                if "trace" in self._parallelize_options:
                    trace = Path(self._parallelize_options["trace"])
                    trace.replace(trace.with_stem(f"{trace.stem}-before"))
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    def _serve_with(self, pipe: Any) -> bool:
        """Serve requests until the end; return True if the workers must be restarted because one was lost."""
        with parallelize(pipe, **self._parallelize_options) as run:
            if not self._ready.done():
                self._ready.set_result(_defaults(pipe))
            while (work := self._next()) is not None:
                self._note_progress()
                lost = self._draw(pipe, work, run.report)
                run.report.calls.clear()
                if lost:
                    return True
        return False

    def _draw(self, pipe: Any, work: PipelineJob, report: Calls) -> bool:
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


class PipelineJob:
    """One call of a pipeline."""

    def __init__(
        self,
        arguments: dict[str, Any],
        previews: int,
        report: Report | None,
        on_progress: Callable[[], None],
        withdraw: Callable[[PipelineJob], bool],
    ) -> None:
        self.images: Future[Images] = Future()
        self._arguments, self._previews, self._report = arguments, Previews(previews), report
        self._on_progress, self._withdraw = on_progress, withdraw
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True
        if self._withdraw(self):
            self.images.set_exception(CancelledError())

    def draw(self, pipe: Any, report: Calls) -> Images:
        """Call the pipeline; raise CancelledError if the request was cancelled."""
        if self._cancelled:
            raise CancelledError
        decode = decoder(pipe, self._arguments)

        def step(own: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if self._cancelled:
                raise CancelledError
            self._on_progress()
            if self._report is not None:
                self._report(self._event(index + 1, int(own.num_timesteps), kwargs, decode))
            return kwargs

        images = pipe(**self._arguments, callback_on_step_end=step).images
        facts: dict[str, Any] = {}
        if report.calls:
            facts = {name: getattr(report.calls[-1], name) for name in RUN_FACTS}
            facts["notes"] = [*report.calls[-1].doubts, *report.calls[-1].notes]  # including lost workers
        return Images([_png(image) for image in images], facts)

    def _event(
        self, step: int, steps: int, kwargs: dict[str, Any], decode: Callable[[torch.Tensor], bytes | None]
    ) -> ProgressEvent:
        """Return the progress of a step. Its preview is decoded now, since the next step may overwrite the latents."""
        latents = kwargs.get("latents")
        png = decode(latents) if latents is not None and self._previews.is_due(step, steps) else None
        return ProgressEvent(step, steps, None if png is None else lambda: png)


def _defaults(pipe: Any) -> dict[str, Any]:
    """Return the default of each parameter of the pipeline's call, with the size in pixels."""
    taken = {name: each.default for name, each in inspect.signature(pipe.__call__).parameters.items()}
    side = int(getattr(pipe, "default_sample_size", None) or 64) * int(getattr(pipe, "vae_scale_factor", 1))
    for name in ("width", "height"):
        taken[name] = taken.get(name) or side
    return taken


def load(
    name: str, parallelize_options: Mapping[str, Any], max_work: float = 1e9, max_queue: int = 64
) -> PipelineBackend:
    """Return a backend over the pipeline that `load_pipeline` loads by this name; raise ValueError if there is none.

    The pipeline is moved to the first GPU in `parallelize_options["devices"]`, if there is one.
    """

    def made() -> Any:
        pipe = load_pipeline(name)
        move_to_gpu(pipe, parallelize_options["devices"])
        return pipe

    return PipelineBackend(made, name, parallelize_options, max_work, max_queue)


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
