"""Headless Chromium, spoken to over a pipe (the DevTools protocol, `--remote-debugging-pipe`).

`python -m tests.browser URL FILE` waits until the page's body says `data-state="done"`, and writes a screenshot.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from PIL import Image

DEADLINE = 60.0

PROGRAM = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One page."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._buffer, self._number = read, write, b"", 0
        targets = self._ask("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    _session: str | None = None

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + DEADLINE
        while True:
            while b"\0" not in self._buffer:
                if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise TimeoutError(f"the browser did not answer {method}")
                self._buffer += os.read(self._read, 1 << 20)
            head, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(head)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def go(self, url: str) -> None:
        """Load a page."""
        self._ask("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Return what an expression of the page's comes to."""
        result = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        return result["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + DEADLINE
        while not self.value(expression):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"not so in time: {expression}; the page says {self.value('document.body.innerText')}"
                )
            time.sleep(0.05)

    def resize(self, width: int, height: int) -> None:
        """Set the size of the page's window."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """Say that the user prefers the colour scheme `light` or `dark`."""
        self._ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, height: int, width: int = 900) -> bytes:
        """Return a screenshot as PNG."""
        self.resize(width, height)
        return base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start Chromium; end it."""
    assert PROGRAM is not None
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium") as profile:
        arguments = [
            "--headless=new",
            "--no-sandbox",  # root, as in most containers, has none
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "about:blank",
        ]
        # It reads commands from descriptor 3 and answers on 4.
        command = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        process = subprocess.Popen(
            ["bash", "-c", command, "bash", PROGRAM, *arguments],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            os.close(theirs_in)
            os.close(theirs_out)
            yield Browser(ours_in, ours_out)
        finally:
            with contextlib.suppress(OSError):
                os.write(ours_out, b'{"id": 0, "method": "Browser.close"}\0')
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
            os.close(ours_in)
            os.close(ours_out)


def main(url: str, file: str) -> None:
    """Write a screenshot."""
    with browser() as page:
        page.go(url)
        page.until("document.body?.dataset.state === 'done'")
        height = int(page.value("document.documentElement.scrollHeight"))
        with Image.open(io.BytesIO(page.picture(height))) as picture:
            picture.convert("RGB").quantize(64).save(file, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
