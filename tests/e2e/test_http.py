"""The gateway as `drp http` runs it, in front of `drp serve`, and its page in a real browser."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any

import psutil
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import drp
from drp import Client
from drp.errors import WorkerError
from drp.http.app import _explain
from drp.pictures import encode_grid
from drp.trace import read
from tests.browser import PROGRAM, browser
from tests.gateway import Gateway, events, reference
from tests.serving import DEADLINE, Served
from tests.waiting import until

SLOW: dict[str, Any] = {"steps": 900, "mode": "sequential"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("http")
    trace = ("--trace", str(folder / "run.json"), "--trace-max-events", "1000")
    server = Served(folder, "-d", "2xemulated:2ms", "--max-requests", "4", *trace)
    try:
        yield server
    finally:
        server.end()


def test_images_are_those_of_the_reference(gateway: Gateway) -> None:
    status, answer = gateway.draw(prompt="3 1", n=2, steps=7, seed=4, drafts=3, size="16x8")
    assert status == 200
    assert len(answer["data"]) == 2
    assert base64.b64decode(answer["data"][1]["b64_json"]) == reference([3, 1, 3, 1], steps=7, seed=4, drafts=3)
    assert (answer["drp"]["steps"], answer["drp"]["drafts"], answer["drp"]["rounds"]) == (7, 3, 4)
    assert answer["drp"]["incidents"] == []


def test_a_stream_shows_the_picture_form(gateway: Gateway) -> None:
    status, text = gateway.draw(prompt="31", steps=12, stream=True, partial_images=4, timeline=True)
    assert status == 200
    found = events(text)
    assert [kind for kind, _ in found][-1] == "image_generation.completed"
    assert base64.b64decode(found[-1][1]["b64_json"]) == reference([3, 1], steps=12)
    steps = [data["step"] for kind, data in found if kind == "drp.progress"]
    assert steps == sorted(steps)
    assert steps[-1] == 12
    evaluated = [each["index"] for kind, data in found if kind == "drp.progress" for each in data["evaluations"]]
    assert sorted(evaluated) == list(range(12))
    partial = [data for kind, data in found if kind == "image_generation.partial_image"]
    assert [data["partial_image_index"] for data in partial] == list(range(len(partial)))
    # Spread over the steps; the last state is no preview, but the image.
    assert [data["step"] for data in partial] == sorted({data["step"] for data in partial})
    assert all(0 < data["step"] < 12 for data in partial)
    assert len(partial) <= 4


def test_guidance_and_formats(gateway: Gateway) -> None:
    status, answer = gateway.draw(prompt="31", steps=3, guidance_scale=2, output_format="jpeg", output_compression=50)
    assert (status, answer["output_format"]) == (200, "jpeg")
    with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as image:
        assert (image.format, image.size) == ("JPEG", (16, 8))


def test_a_stream_has_the_fields_of_openais(gateway: Gateway) -> None:
    _, text = gateway.draw(prompt="31", steps=40, stream=True, partial_images=1, output_format="webp")
    found = dict(events(text))
    fields = {"b64_json", "background", "created_at", "output_format", "quality", "size", "type"}
    for kind in ("image_generation.partial_image", "image_generation.completed"):
        assert fields <= found[kind].keys()
        assert (found[kind]["size"], found[kind]["output_format"]) == ("16x8", "webp")
    assert found["image_generation.completed"]["usage"]["output_tokens"] == 0


def test_streams_that_wait_hold_up_nobody(gateway: Gateway, served: Served) -> None:
    """45 of them: were each to hold a thread, health and metrics would wait for one of 40."""
    with Client(served.address) as client, contextlib.ExitStack() as stack:
        until(lambda: client.status().requests == 0, "nothing else is under way")
        body = json.dumps({"prompt": "1", "stream": True, **SLOW})
        for _ in range(45):
            connection = HTTPConnection("127.0.0.1", gateway.port, timeout=DEADLINE)
            stack.callback(connection.close)
            connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        until(lambda: client.status().requests == 4, "the server has as much as it takes")
        for path in ("/health", "/metrics", "/v1/models"):
            assert gateway.get(path)[0] == 200
    with Client(served.address) as client:
        until(lambda: client.status().requests == 0, "all are cancelled")


def test_too_much_is_429_and_streams_say_so_too(gateway: Gateway, served: Served) -> None:
    with Client(served.address) as client:
        for _ in range(4):
            client.submit(labels=[1], **SLOW)
        until(lambda: client.status().requests == 4, "the server has as much as it takes")
        status, answer = gateway.draw(prompt="1")
        assert (status, answer["error"]["type"]) == (429, "server_error")
        _, text = gateway.draw(prompt="1", stream=True)
        [(kind, data)] = events(text)
        assert (kind, data["error"]["code"]) == ("error", "429")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_run(gateway: Gateway, served: Served, stream: bool) -> None:
    with Client(served.address) as client:
        until(lambda: client.status().requests == 0, "nothing else is under way")
        before = client.status().cancelled
        connection = HTTPConnection("127.0.0.1", gateway.port, timeout=DEADLINE)
        body = json.dumps({"prompt": "1", "stream": stream, **SLOW})
        connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        until(lambda: client.status().requests == 1, "the run is under way")
        connection.close()
        until(lambda: client.status().requests == 0, "the run is over")
        assert client.status().cancelled == before + 1


def test_what_failed_inside_is_said_in_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    failed = WorkerError(
        "worker 0 (cpu:0, process 7) failed:\nTraceback (most recent call last):\n  File /home/me/m.py"
    )
    status, words = _explain(failed)
    assert (status, words) == (500, "the run failed (WorkerError); the log of `drp http` says why")
    assert "File /home/me/m.py" in caplog.text


def test_health_metrics_models_and_page(gateway: Gateway) -> None:
    status, text = gateway.get("/health")
    assert status == 200
    assert json.loads(text)["healthy"] is True
    status, text = gateway.get("/metrics")
    assert "drp_requests" in {family.name for family in text_string_to_metric_families(text)}
    assert json.loads(gateway.get("/v1/models")[1])["data"][0]["id"] == "tests.denoisers:Tiny"
    assert json.loads(gateway.get("/v1/models/tests.denoisers:Tiny")[1])["object"] == "model"
    status, text = gateway.get("/")
    assert status == 200
    assert not re.search(
        r"(src|href)=|https?://|@import|url\(", text.replace("https://", "http://").replace("src =", "")
    ), "the page asks another host for something"


@pytest.mark.skipif(PROGRAM is None and "CI" not in os.environ, reason="no Chromium here")
def test_the_page_in_a_browser(gateway: Gateway) -> None:
    with browser() as page:
        page.go(f"{gateway.url}/?prompt=314&steps=10")
        page.until("document.body?.dataset.state === 'done'")
        assert page.value("[picture.naturalWidth, picture.naturalHeight].join()") == "24,8"
        shown = page.value("picture.src").removeprefix("data:image/png;base64,")
        samples = drp.reference("tests.denoisers:Tiny", labels=[3, 1, 4], devices=2, steps=10).samples
        assert base64.b64decode(shown) == encode_grid(samples, 3, 1, 0)
        assert page.value("document.querySelectorAll('#timeline rect').length") == 10
        assert "10 steps in 6 rounds, 10 evaluations" in page.value("facts.textContent")
        assert page.value("document.querySelectorAll('#film img').length") >= 1
        page.value(
            "document.getElementById('prompt').value = 'x'; document.getElementById('mode').value = 'aggressive'"
        )
        page.value("run()")
        page.until("document.body.dataset.state === 'failed'")
        assert "write digits" in page.value("facts.textContent")


def test_a_lost_worker_is_told(gateway: Gateway, served: Served) -> None:
    with Client(served.address) as client, ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(lambda: gateway.draw(prompt="1", **SLOW))
        until(lambda: client.status().requests == 1, "the run is under way")
        worker = psutil.Process(served.process.pid).children()[0]
        worker.kill()
        status, answer = drawing.result(DEADLINE)
    assert status == 200
    incident, *_ = answer["drp"]["incidents"]
    assert f"process {worker.pid}) was killed by SIGKILL" in incident


def test_a_server_that_is_gone_shows_in_the_health_and_leaves_its_trace(gateway: Gateway, served: Served) -> None:
    assert gateway.draw(prompt="1", steps=500)[0] == 200
    assert gateway.draw(prompt="1", steps=9)[0] == 200
    assert served.end()[0] == 0
    marks, devices, dropped = read(served.folder / "run.json")  # of the newest run, not of the long one before
    assert [mark.kind for mark in marks].count("predicted") == 9
    assert dropped > 500
    assert len(devices) == 2
    until(lambda: gateway.get("/health")[0] == 503, "the gateway says that the server is gone")
    assert "no server answers" in gateway.get("/health")[1]
    status, answer = gateway.draw(prompt="1")
    assert (status, answer["error"]["type"]) == (503, "server_error")
