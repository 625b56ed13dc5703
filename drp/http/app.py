"""The application: images in OpenAI's convention, health, metrics, and a page that shows a picture form."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from drp.client import RefusedError
from drp.http.work import Backend, Images, Order, Work

PAGE = Path(__file__).with_name("page.html")
LOOK = 0.5
"""Seconds after which is looked whether a client is still there."""

RUN_OPTIONS = ("steps", "seed", "mode", "drafts", "guidance", "solver", "rule", "tolerance")


class Body(BaseModel):
    """A request for images: OpenAI's fields, as far as they mean something here, and options of a run."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(max_length=32_000)]
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=10)] = 1
    size: str | None = None
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=100)] = 0
    timeline: bool = False
    user: str | None = None
    steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    mode: str | None = None
    drafts: Annotated[int, Field(ge=1, le=1024)] | None = None
    guidance: float | None = None
    solver: str | None = None
    rule: str | None = None
    tolerance: Annotated[float, Field(ge=0)] | None = None

    def order(self) -> Order:
        """Return what a backend is asked for."""
        given = {name: getattr(self, name) for name in RUN_OPTIONS}
        options = {name: value for name, value in given.items() if value is not None}
        return Order(self.prompt, self.n, self.size, self.partial_images, self.timeline, options)


def make_app(backend: Backend) -> FastAPI:
    """Return the application; `backend` is closed when it ends."""

    @asynccontextmanager
    async def closing(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(backend.close)

    app = FastAPI(title="drp", lifespan=closing, docs_url=None, redoc_url=None)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return _refusal(400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")

    @app.post("/v1/images/generations")
    async def _generate(body: Body, request: Request) -> Response:
        if body.model not in (None, backend.model):
            return _refusal(404, f"model is {body.model!r}; here is {backend.model!r}")
        try:
            work = await run_in_threadpool(backend.begin, body.order())
        except Exception as error:
            return _refusal(*_told(error))
        if body.stream:
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(_events(work), media_type="text/event-stream", headers=headers)
        try:
            return JSONResponse(_answer(await _images(work, request)))
        except (Exception, CancelledError) as error:
            return _refusal(*_told(error))

    @app.get("/v1/models")
    async def _models() -> Response:
        return JSONResponse({"object": "list", "data": [{"id": backend.model, "object": "model", "owned_by": "drp"}]})

    @app.get("/health")
    async def _health() -> Response:
        try:
            healthy, facts = await run_in_threadpool(backend.health)
        except (OSError, TimeoutError, RuntimeError) as error:
            healthy, facts = False, {"reason": str(error)}
        return JSONResponse({"healthy": healthy, **facts}, 200 if healthy else 503)

    @app.get("/metrics")
    async def _metrics() -> Response:
        text = await run_in_threadpool(backend.metrics)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def _page() -> Response:
        headers = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src data:; base-uri 'none'"}
        return HTMLResponse(PAGE.read_text(), headers=headers)

    return app


async def _images(work: Work, request: Request) -> Images:
    """Wait for the images; end the work if its client goes away."""
    images = asyncio.wrap_future(work.images)
    images.add_done_callback(lambda done: done.cancelled() or done.exception())  # Nobody may be left to ask for it.
    try:
        while not images.done():
            await asyncio.wait([images], timeout=LOOK)
            if not images.done() and await request.is_disconnected():
                raise CancelledError
        return images.result()
    finally:
        work.cancel()


async def _events(work: Work) -> AsyncIterator[str]:
    """Yield server-sent events; a client that goes away closes this generator."""
    index = 0
    try:
        async for news in iterate_in_threadpool(work.news()):
            yield _event("drp.progress", {"step": news.step, "steps": news.steps, **news.facts})
            if news.preview is not None:
                partial = {"b64_json": _text(news.preview), "partial_image_index": index, "step": news.step}
                yield _event("image_generation.partial_image", {**partial, **_made()})
                index += 1
        images = await asyncio.wrap_future(work.images)
        for png in images.pngs:
            yield _event("image_generation.completed", {"b64_json": _text(png), **_made(), "drp": images.facts})
    except (Exception, CancelledError) as error:
        yield _event("error", _error(*_told(error)))
    finally:
        work.cancel()


def _answer(images: Images) -> dict[str, Any]:
    data = [{"b64_json": _text(png)} for png in images.pngs]
    return {"created": int(time.time()), "data": data, "output_format": "png", "drp": images.facts}


def _made() -> dict[str, Any]:
    return {"created_at": int(time.time()), "output_format": "png"}


def _event(kind: str, data: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


def _text(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _told(error: BaseException) -> tuple[int, str]:
    """Return the status and the words of an error."""
    if isinstance(error, ValueError):
        return 400, str(error)
    if isinstance(error, RefusedError):
        return (429 if error.code == "busy" else 503), str(error)
    if isinstance(error, CancelledError):
        return 499, "cancelled"
    if isinstance(error, (ConnectionError, TimeoutError)):
        return 503, str(error)
    return 500, str(error) or repr(error)


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": str(status)}}


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse(_error(status, message), status)
