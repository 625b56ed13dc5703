"""A diffusers pipeline behind the images endpoint: a small real one, its steps on real workers."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import psutil
import pytest
import torch
from PIL import Image, ImageChops

from drp.errors import RefusedError
from drp.http.jobs import ImageRequest, ProgressEvent
from drp.http.pipeline import PipelineBackend, load
from drp.trace import read
from tests.integration.test_trace import check_format

EXAMPLES = str(Path(__file__).parents[2] / "examples" / "pipelines")
DEADLINE = 60.0
SPREAD: dict[str, Any] = {"devices": 2, "mode": "aggressive"}

pytestmark = pytest.mark.diffusers


@pytest.fixture(scope="module")
def other_processes() -> set[psutil.Process]:
    """Return this process's children before the backend starts its own: workers that other tests share."""
    return set(psutil.Process().children())


@pytest.fixture(scope="module")
def backend(
    tmp_path_factory: pytest.TempPathFactory, other_processes: set[psutil.Process]
) -> Iterator[PipelineBackend]:
    trace = tmp_path_factory.mktemp("http") / "run.json"
    sys.path.append(EXAMPLES)
    try:
        backend = load("tiny:sdxl", SPREAD | {"trace": trace, "trace_max_events": 10_000})
        yield backend
        backend.close()
        assert not backend.health()[0]
        marks, devices, dropped = read(trace)
        assert (devices, dropped) == (("cpu:0", "cpu:1"), 0)
        assert {"begin", "sent", "predicted", "lost", "end"} <= {mark.kind for mark in marks}
        check_format(trace)
    finally:
        sys.path.remove(EXAMPLES)


def order(previews: int = 0, **options: object) -> ImageRequest:
    return ImageRequest("a cat", 1, "64x64", previews, options={"steps": 6, "seed": 3, "guidance": 2.0, **options})


def same(png: bytes, image: Image.Image) -> bool:
    with Image.open(io.BytesIO(png)) as drawn:
        return ImageChops.difference(drawn, image).getbbox() is None


def test_the_images_are_the_pipelines(backend: PipelineBackend) -> None:
    from drp.diffusers import reference

    pipe = importlib.import_module("tiny").sdxl()
    with reference(pipe, **SPREAD):
        expected = pipe(
            "a cat",
            height=64,
            width=64,
            num_inference_steps=6,
            guidance_scale=2.0,
            generator=torch.Generator().manual_seed(3),
        ).images[0]
    begun: SimpleQueue[ProgressEvent] = SimpleQueue()
    left = backend.begin(order(steps=400), begun.put)
    assert begun.get(timeout=DEADLINE).facts == {"ahead": 0}
    assert begun.get(timeout=DEADLINE).step == 1
    events: list[ProgressEvent] = []
    work = backend.begin(order(previews=2), events.append)
    waiting = backend.begin(order())
    waiting.cancel()  # It has not begun, and ends at once.
    with pytest.raises(CancelledError):
        waiting.images.result(0)
    left.cancel()
    with pytest.raises(CancelledError):
        left.images.result(DEADLINE)
    images = work.images.result(DEADLINE)
    assert events[0].facts == {"ahead": 1}
    assert [(each.step, each.steps) for each in events[1:]] == [(k, 6) for k in range(1, 7)]
    previews = {each.step: each.preview() for each in events if each.preview is not None}
    assert list(previews) == [2, 4]
    with Image.open(io.BytesIO(previews[4])) as preview:
        assert (preview.format, preview.size) == ("PNG", (64, 64))
    assert same(images.pngs[0], expected)
    assert (images.facts["steps"], images.facts["rounds"], images.facts["devices"]) == (6, 4, ("cpu:0", "cpu:1"))
    assert backend.health()[0]
    assert 'drp_requests_total{outcome="finished"} 1' in backend.metrics()


def test_a_lost_worker_is_told(backend: PipelineBackend, other_processes: set[psutil.Process]) -> None:
    assert backend.begin(order(steps=12)).images.result(DEADLINE).facts["notes"] == []  # fewer than 10 would be noted
    begun: SimpleQueue[ProgressEvent] = SimpleQueue()
    work = backend.begin(order(steps=30), begun.put)
    while begun.get(timeout=DEADLINE).step == 0:
        pass
    worker = (set(psutil.Process().children()) - other_processes).pop()
    worker.kill()
    notes = work.images.result(DEADLINE).facts["notes"]
    assert any(f"process {worker.pid}) was killed by SIGKILL" in note for note in notes)


def test_what_a_pipeline_does_not_take_is_refused(backend: PipelineBackend) -> None:
    with pytest.raises(ValueError, match="mode is given, which tiny:sdxl does not take"):
        backend.begin(order(mode="adaptive"))
    with pytest.raises(ValueError, match="size is 'large'"):
        backend.begin(ImageRequest("a cat", size="large"))
    with pytest.raises(ValueError, match="at most 16384 each"):
        backend.begin(ImageRequest("a cat", size="99999x99999"))
    with pytest.raises(ValueError, match=r"1000 steps are .* pixel steps, and one request may have 1e\+09"):
        backend.begin(ImageRequest("a cat", n=10, size="1024x1024", options={"steps": 1000}))
    with pytest.raises(ValueError, match="'nowhere:sdxl': there is no module 'nowhere'"):
        load("nowhere:sdxl", SPREAD)


def test_more_than_may_wait_is_refused(backend: PipelineBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_max_queue", 1)
    begun: SimpleQueue[ProgressEvent] = SimpleQueue()
    first = backend.begin(order(steps=400), begun.put)
    while begun.get(timeout=DEADLINE).step == 0:
        pass
    second = backend.begin(order())
    with pytest.raises(RefusedError, match="busy: 2 requests are open"):
        backend.begin(order())
    for work in (second, first):
        work.cancel()
        with pytest.raises(CancelledError):
            work.images.result(DEADLINE)
