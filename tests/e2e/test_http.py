"""The gateway as `drp http` runs it, in front of `drp serve`, and its page in a real browser."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import drp
from drp import Client
from drp.cli.http import own_names
from drp.errors import WorkerError
from drp.http.app import _explain
from drp.pictures import encode_grid
from drp.trace import read
from tests.browser import PROGRAM, browser
from tests.e2e.test_server import DEADLINE, ROOT, Served, until

SLOW: dict[str, Any] = {"steps": 900, "mode": "sequential"}


class Gateway:
    """`drp http` as a process."""

    def __init__(self, *arguments: str) -> None:
        command = [str(Path(sys.executable).with_name("drp")), "http", "--port", "0", *arguments]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"serving \S+ at (http://127\.0\.0\.1:(\d+))\n", line)
        assert found is not None, line + self.process.communicate(timeout=DEADLINE)[1]
        self.url, self.port = found[1], int(found[2])

    def get(self, path: str) -> tuple[int, str]:
        return self._ask(urllib.request.Request(self.url + path))

    def draw(self, **body: Any) -> tuple[int, Any]:
        status, text = self.post(json.dumps(body).encode())
        return status, text if body.get("stream") else json.loads(text)

    def post(self, body: bytes, **headers: str) -> tuple[int, str]:
        headers = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): each for name, each in headers.items()
        }
        return self._ask(urllib.request.Request(f"{self.url}/v1/images/generations", body, headers))

    def _ask(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def end(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        try:
            _, errors = self.process.communicate(timeout=DEADLINE)
        finally:
            self.process.kill()
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("http")
    trace = ("--trace", str(folder / "run.json"), "--trace-max-events", "1000")
    server = Served(folder, "-d", "2xemulated:2ms", "--max-requests", "4", *trace)
    try:
        yield server
    finally:
        server.end()


@pytest.fixture(scope="module")
def gateway(served: Served) -> Iterator[Gateway]:
    gateway = Gateway("-c", served.address)
    yield gateway
    status, errors = gateway.end()
    assert (status, errors) == (0, "")


def reference(labels: list[int], **options: Any) -> bytes:
    samples = drp.reference("tests.denoisers:Tiny", labels=labels, devices=2, **options).samples
    return encode_grid(samples[-2:], 2, 1, 0)


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = re.findall(r"event: (.*)\ndata: (.*)\n\n", text)
    assert all(json.loads(data)["type"] == kind for kind, data in found)
    return [(kind, json.loads(data)) for kind, data in found]


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


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "a cat"}, 400, "write digits, as in '314'"),
        ({"prompt": ""}, 400, "write digits"),
        ({"prompt": "1", "size": "1024x1024"}, 400, "are 8x8, or leave it out"),
        ({"prompt": "1", "mode": "fast"}, 400, "unknown mode 'fast'"),
        ({"prompt": "1", "stepz": 4}, 400, "stepz"),
        ({"prompt": "٣"}, 400, "write digits"),
        ({"prompt": "²"}, 400, "write digits"),
        ({"prompt": "1" * 10_000}, 400, "prompt names 10000 digits, 80000 pixels; at most 16384: ask for fewer"),
        ({"prompt": "1" * 2000, "n": 10, "steps": 1000}, 400, "1.28e+09 pixel steps, and one request may have 1e+09"),
        ({"prompt": "1", "negative_prompt": "2"}, 400, "negative_prompt is given, which tests.denoisers:Tiny does not"),
        ({"prompt": "1", "background": "transparent"}, 400, "background: "),
        ({"prompt": "1", "guidance": 1e308}, 400, "guidance: "),
        ({"prompt": "1", "guidance": float("nan")}, 400, "guidance: "),
        ({"prompt": "1", "steps": 4, "num_inference_steps": 4}, 400, "num_inference_steps: "),
        ({"prompt": "1", "n": True}, 400, "n: "),
        ({"prompt": "1", "seed": -1}, 400, "seed: "),
        ({"prompt": "1", "seed": 2**70}, 400, "seed: "),
        ({"prompt": "1", "mode": "m" * 1000}, 400, "mode: "),
        ({"prompt": "1", "\ud800": 1}, 400, "send JSON as Content-Type application/json"),
        ({"prompt": "1", "n": 99}, 400, "n: "),
        ({"prompt": "1", "response_format": "url"}, 400, "response_format"),
        ({"n": 1}, 400, "prompt"),
        ({"prompt": "1", "model": "dall-e-3"}, 404, "here is 'tests.denoisers:Tiny'"),
    ],
)
def test_what_cannot_be_is_refused(gateway: Gateway, body: dict[str, Any], status: int, message: str) -> None:
    got, answer = gateway.draw(**body)
    assert got == status
    assert message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


NULLS = [
    "model",
    "n",
    "size",
    "quality",
    "style",
    "background",
    "moderation",
    "response_format",
    "output_format",
    "output_compression",
    "stream",
    "partial_images",
    "timeline",
    "user",
    "steps",
    "seed",
    "mode",
    "drafts",
    "guidance",
    "negative_prompt",
    "solver",
    "rule",
    "tolerance",
]


@pytest.mark.parametrize(
    "body",
    [
        dict.fromkeys(NULLS),
        {"quality": "auto", "style": "auto", "background": "auto", "moderation": "auto", "user": "me"},
        {"quality": "standard", "style": "vivid", "moderation": "low", "model": "tests.denoisers:Tiny", "size": "auto"},
        {"num_inference_steps": 48, "response_format": "b64_json", "partial_images": 3},
    ],
    ids=["nulls", "auto", "words", "diffusers"],
)
def test_what_clients_of_openai_send_is_taken(gateway: Gateway, body: dict[str, Any]) -> None:
    status, answer = gateway.draw(prompt="31", **body)
    assert status == 200, answer
    assert base64.b64decode(answer["data"][0]["b64_json"]) == reference([3, 1], steps=48)
    facts = {name: answer[name] for name in ("size", "background", "quality", "output_format")}
    quality = body.get("quality") or "auto"
    assert facts == {"size": "16x8", "background": "opaque", "quality": quality, "output_format": "png"}
    assert answer["usage"]["total_tokens"] == 0


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


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"{", {}),
        (b"", {}),
        (b"null", {}),
        (b"[]", {}),
        (b"[" * 100_000, {}),
        (b'{"prompt": "\xff"}', {}),
        (b'{"prompt": "\\ud800"}', {}),
        (b'{"prompt": "1", "seed": ' + b"9" * 5000 + b"}", {}),
        (b'{"prompt": "1"}', {"Content_Type": "text/plain"}),  # as a page of another site may send it, unasked
    ],
    ids=lambda value: str(value)[:20],
)
def test_bodies_that_are_none_are_refused_in_openais_form(
    gateway: Gateway, body: bytes, headers: dict[str, str]
) -> None:
    got, text = gateway.post(body, **headers)
    assert got == 400, text
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/v1/nope", "/v1/images/edits", "/docs", "/v1/models/nope", "/v1/images/generations"])
def test_paths_that_are_none_are_refused_in_openais_form(gateway: Gateway, path: str) -> None:
    status, text = gateway.get(path)
    assert status in (404, 405)
    assert json.loads(text)["error"]["type"] == "invalid_request_error"


def test_bodies_that_are_too_long_are_cut_off(gateway: Gateway) -> None:
    before = psutil.Process(gateway.process.pid).memory_info().rss
    head = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for length in (b"Content-Length: 2000000", b"Transfer-Encoding: chunked"):
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=DEADLINE) as sender:
            sender.sendall(head + length + b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                for _ in range(50 if b"chunked" in length else 0):
                    sender.sendall(b"100000\r\n" + b" " * 0x100000 + b"\r\n")
            with contextlib.suppress(ConnectionResetError):  # What was sent too much may come before the answer.
                answer = HTTPResponse(sender)
                answer.begin()
                assert answer.status == 413
                error = json.loads(answer.read())["error"]
                assert error["type"] == "invalid_request_error"
                assert "at most 1048576 bytes" in error["message"]
    assert psutil.Process(gateway.process.pid).memory_info().rss - before < 20 << 20
    assert gateway.get("/v1/models")[0] == 200


def test_only_its_own_names_are_answered(gateway: Gateway) -> None:
    for host, status in (
        ("localhost", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:80", 200),
        ("evil.example", 400),
        ("x", 400),
    ):
        connection = HTTPConnection("127.0.0.1", gateway.port, timeout=DEADLINE)
        connection.request("GET", "/v1/models", headers={"Host": host})
        answer = connection.getresponse()
        assert answer.status == status, host
        text = json.loads(answer.read())
        assert status == 200 or "--allow-host" in text["error"]["message"]
        connection.close()
    assert {"localhost", "127.0.0.1", "[::1]", "10.0.0.1"} <= set(own_names("10.0.0.1"))
    assert socket.gethostname() in own_names("0.0.0.0")


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
