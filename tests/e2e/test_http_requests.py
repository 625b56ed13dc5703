"""Which requests the gateway accepts and refuses, in the form of OpenAI's API."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import psutil
import pytest

from drp.cli.http import own_names
from tests.gateway import Gateway, reference
from tests.serving import DEADLINE


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": "a cat"}, 400, "write digits, as in '314'"),
        ({"prompt": ""}, 400, "write digits"),
        ({"prompt": "1", "size": "1024x1024"}, 400, "this prompt makes an image of 8x8; give that, or leave size out"),
        ({"prompt": "1", "mode": "fast"}, 400, "unknown mode 'fast'"),
        ({"prompt": "1", "stepz": 4}, 400, "unknown option 'stepz'; did you mean 'steps'?"),
        ({"prompt": "٣"}, 400, "write digits"),
        ({"prompt": "²"}, 400, "write digits"),
        ({"prompt": "1" * 10_000}, 400, "prompt names 10000 digits, 80000 pixels; at most 16384: ask for fewer"),
        ({"prompt": "1" * 2000, "n": 10, "steps": 1000}, 400, "1.28e+09 pixel steps, and one request may have 1e+09"),
        ({"prompt": "1", "negative_prompt": "2"}, 400, "negative_prompt is given, which tests.denoisers:Tiny does not"),
        ({"prompt": "1", "background": "transparent"}, 400, "background is 'transparent': "),
        ({"prompt": "1", "guidance": 1e308}, 400, "guidance is 1e+308: "),
        ({"prompt": "1", "guidance": float("nan")}, 400, "guidance is nan: "),
        (
            {"prompt": "1", "steps": 4, "num_inference_steps": 4},
            400,
            "num_inference_steps is given, and also by its other name",
        ),
        ({"prompt": "1", "n": True}, 400, "n is True: "),
        ({"prompt": "1", "seed": -1}, 400, "seed is -1: input should be greater than or equal to 0"),
        ({"prompt": "1", "seed": 2**70}, 400, f"seed is {2**70}: "),
        ({"prompt": "1", "mode": "m" * 1000}, 400, f"mode is '{'m' * 79}: "),
        ({"prompt": "1", "\ud800": 1}, 400, "send JSON as Content-Type application/json"),
        ({"prompt": "1", "n": 99}, 400, "n is 99: "),
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
