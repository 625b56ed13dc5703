"""The HTTP application: OpenAI's images endpoint, health, metrics, and a page that shows an image being sampled."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from drp.errors import RefusedError
from drp.http.body import MAX_BODY, SECOND_NAMES, Body
from drp.http.jobs import Backend, ImageJob, Images, ProgressEvent
from drp.sampling.options import describe_unknown

PAGE = Path(__file__).with_name("page.html")
DISCONNECT_CHECK_INTERVAL = 0.5
"""Seconds between checks for a client that has disconnected."""

TOO_LONG = f"the body is too long; a request has at most {MAX_BODY} bytes"
REFUSED = {400: "the Host header names another server than this one; `drp http --allow-host` adds names", 413: TOO_LONG}
"""The messages for requests that middleware refuses, by status."""

log = logging.getLogger(__name__)


def make_app(backend: Backend, hosts: Sequence[str] = ("localhost", "127.0.0.1", "[::1]")) -> FastAPI:
    """Return the application; `backend` is closed when it ends.

    hosts: the accepted Host headers, `"*"` for any. This prevents DNS rebinding, by which a page of another site sends
        requests here under its own name.
    """

    @asynccontextmanager
    async def closing(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(backend.close)

    app = FastAPI(title="drp", lifespan=closing, docs_url=None, redoc_url=None)
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(_PlainTextErrors)  # The middleware added last is the outermost.
    _answer_errors(app)
    _serve_images(app, backend)
    _serve_facts(app, backend)
    return app


def _serve_images(app: FastAPI, backend: Backend) -> None:
    """Add OpenAI's images endpoint."""

    @app.post("/v1/images/generations")
    async def _generate(body: Body, request: Request) -> Response:
        if body.model not in (None, backend.model):
            return _refusal(404, f"model is {body.model!r}; here is {backend.model!r}", "model")
        events: asyncio.Queue[ProgressEvent | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def report(event: ProgressEvent | None) -> None:
            with contextlib.suppress(RuntimeError):  # The loop may have ended.
                loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            work = await run_in_threadpool(backend.begin, body.image_request(), report if body.stream else None)
        except Exception as error:
            return _refusal(*_explain(error))
        if body.stream:
            work.images.add_done_callback(lambda _: report(None))
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(_stream(work, events, body), media_type="text/event-stream", headers=headers)
        try:
            images = await _images(work, request)
            return JSONResponse(await run_in_threadpool(_answer, images, body))
        except (Exception, CancelledError) as error:
            return _refusal(*_explain(error))


def _serve_facts(app: FastAPI, backend: Backend) -> None:
    """Add the model's description, health, metrics and the page."""

    @app.get("/v1/models")
    async def _models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(backend)]})

    @app.get("/v1/models/{name:path}")
    async def _model_called(name: str) -> Response:
        if name != backend.model:
            return _refusal(404, f"model is {name!r:.200}; here is {backend.model!r}", "model")
        return JSONResponse(_model(backend))

    @app.get("/health")
    async def _health() -> Response:
        try:
            healthy, facts = await run_in_threadpool(backend.health)
        except (OSError, TimeoutError, RuntimeError) as error:
            healthy, facts = False, {"reason": str(error)}
        return JSONResponse({"healthy": healthy, **facts}, 200 if healthy else 503)

    @app.get("/metrics")
    async def _metrics() -> Response:
        try:
            text = await run_in_threadpool(backend.metrics)
        except (OSError, TimeoutError, RuntimeError) as error:
            return _refusal(503, str(error))
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def _page() -> Response:
        policy = "default-src 'self' 'unsafe-inline'; img-src data:; base-uri 'none'; frame-ancestors 'none'"
        return HTMLResponse(PAGE.read_text(), headers={"Content-Security-Policy": policy})


def _answer_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's form, without internal details."""

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][1:]))
        if first["type"] == "json_invalid":
            return _refusal(400, f"the body is not valid JSON: {first['ctx']['error']}, at character {name}")
        if not name:
            return _refusal(400, "the body is not an object; send JSON as Content-Type application/json")
        if name == "response_format":
            return _refusal(400, "response_format: images are in the answer alone; ask for 'b64_json'", name)
        if first["type"] == "extra_forbidden":
            return _refusal(400, _unknown(name), name)
        given = "" if first["type"] == "missing" else f" is {first['input']!r:.80}"
        return _refusal(400, f"{name}{given}: {first['msg'][:1].lower()}{first['msg'][1:]}", name)

    @app.exception_handler(HTTPException)
    async def _refused(request: Request, error: HTTPException) -> Response:
        what = TOO_LONG if error.status_code == 413 else f"{request.method} {request.url.path}: {error.detail}"
        answer = _refusal(error.status_code, what)
        answer.headers.update(error.headers or {})
        return answer

    @app.exception_handler(Exception)
    async def _failed(request: Request, error: Exception) -> Response:
        return _refusal(500, "an error of the gateway's own; its log says which")


def _unknown(name: str) -> str:
    """Return the message for a field that is not known, or that is also given by its other name."""
    if name in SECOND_NAMES.values():
        return f"{name} is given, and also by its other name; leave one of them out"
    return describe_unknown(name, [*Body.model_fields])


class _PlainTextErrors:
    """Middleware that converts plain-text refusals of the inner middleware to OpenAI's form."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused: int | None = None

        async def convert(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] in REFUSED:
                kind = dict(message["headers"]).get(b"content-type", b"")
                refused = message["status"] if kind.startswith(b"text/plain") else None
            if refused is None:
                await send(message)
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                await _refusal(refused, REFUSED[refused])(scope, receive, send)

        await self._app(scope, receive, convert)


async def _images(work: ImageJob, request: Request) -> Images:
    """Wait for the images; cancel the job if the client disconnects."""
    images = asyncio.wrap_future(work.images)
    images.add_done_callback(lambda done: done.cancelled() or done.exception())  # Marks an exception as retrieved.
    try:
        while not images.done():
            await asyncio.wait([images], timeout=DISCONNECT_CHECK_INTERVAL)
            if not images.done() and await request.is_disconnected():
                raise CancelledError
        return images.result()
    finally:
        work.cancel()


async def _stream(work: ImageJob, events: asyncio.Queue[ProgressEvent | None], body: Body) -> AsyncIterator[str]:
    """Yield server-sent events. The generator is closed if the client disconnects."""
    index = 0
    try:
        while (event := await events.get()) is not None:
            yield _event("drp.progress", {"step": event.step, "steps": event.steps, **event.facts})
            if event.preview is not None:
                image = await run_in_threadpool(_encode, await run_in_threadpool(event.preview), body)
                partial = {"partial_image_index": index, "step": event.step, "created_at": int(time.time())}
                yield _event("image_generation.partial_image", {**image, **partial})
                index += 1
        images = await asyncio.wrap_future(work.images)
        for png in images.pngs:
            image = await run_in_threadpool(_encode, png, body)
            made = {"created_at": int(time.time()), "usage": _usage(), "drp": images.facts}
            yield _event("image_generation.completed", {**image, **made})
    except (Exception, CancelledError) as error:
        yield _event("error", _error(*_explain(error)))
    finally:
        work.cancel()


def _encode(png: bytes, body: Body) -> dict[str, Any]:
    """Return the fields of one image in the requested format."""
    with Image.open(io.BytesIO(png)) as image:
        if body.output_format != "png":
            file = io.BytesIO()
            image.convert("RGB").save(file, body.output_format, quality=body.output_compression)
            png = file.getvalue()
        return {"b64_json": base64.b64encode(png).decode(), **body.facts(*image.size)}


def _answer(images: Images, body: Body) -> dict[str, Any]:
    encoded = [_encode(png, body) for png in images.pngs]
    data = [{"b64_json": each.pop("b64_json")} for each in encoded]
    return {"created": int(time.time()), "data": data, **encoded[0], "usage": _usage(), "drp": images.facts}


def _usage() -> dict[str, Any]:
    """Return the usage that OpenAI's clients expect; all counts are 0."""
    details = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "input_tokens_details": details, "output_tokens": 0, "total_tokens": 0}


def _model(backend: Backend) -> dict[str, Any]:
    return {"id": backend.model, "object": "model", "created": 0, "owned_by": "drp"}


def _event(kind: str, data: Mapping[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"


def _explain(error: BaseException) -> tuple[int, str]:
    """Return the status and the message for an error. Internal errors and workers' tracebacks are only logged."""
    if isinstance(error, ValueError):
        return 400, str(error)
    if isinstance(error, RefusedError):
        return (429 if error.code == "busy" else 503), str(error)
    if isinstance(error, CancelledError):
        return 499, "cancelled"
    if isinstance(error, (ConnectionError, TimeoutError)):
        return 503, str(error)
    log.error("a request failed: %s", error, exc_info=error)
    return 500, f"the run failed ({type(error).__name__}); the log of `drp http` says why"


def _error(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 429 else "server_error"
    readable = message.encode(errors="replace").decode()  # A name may contain a lone surrogate.
    return {"error": {"message": readable, "type": kind, "param": param, "code": str(status)}}


def _refusal(status: int, message: str, param: str | None = None) -> JSONResponse:
    return JSONResponse(_error(status, message, param), status)
