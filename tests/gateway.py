"""`drp http` as a process, and what it answers."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import drp
from drp.pictures import encode_grid
from tests.serving import DEADLINE, ROOT


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


def reference(labels: list[int], **options: Any) -> bytes:
    samples = drp.reference("tests.denoisers:Tiny", labels=labels, devices=2, **options).samples
    return encode_grid(samples[-2:], 2, 1, 0)


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = re.findall(r"event: (.*)\ndata: (.*)\n\n", text)
    assert all(json.loads(data)["type"] == kind for kind, data in found)
    return [(kind, json.loads(data)) for kind, data in found]
