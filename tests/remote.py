"""Workers on other machines, for tests on one: processes `drp worker`, and peers that speak the protocol by hand."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import zmq

from drp.protocol import keys
from drp.protocol.codec import decode, encode
from drp.protocol.messages import TO_WORKER, VERSION, Hello, Ping, Pong, ToLeader, ToWorker

ROOT = Path(__file__).parents[1]
DEADLINE = 30.0


def free_address() -> str:
    """Return an address that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def start_worker(address: str, folder: Path | None, name: str, *options: str, **environ: str) -> subprocess.Popen[str]:
    """Start `drp worker` with the keys of a name in a folder, if there is one."""
    command = [str(Path(sys.executable).with_name("drp")), "worker", address]
    command += ["--key", str(folder / "workers" / f"{name}.key_secret")] if folder is not None else []
    command += options or ("--device", "cpu:0")
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environ
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@contextlib.contextmanager
def ending(processes: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """Kill what is left of some processes."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=DEADLINE)


class FakeWorker:
    """A DEALER with a worker's keys, whose messages a test makes itself; `ahead` is by how much its clock is."""

    def __init__(self, address: str, folder: Path, name: str, identity: str | None = None, ahead: float = 0.0) -> None:
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.identity = identity or f"{name}-{uuid.uuid4().hex}"
        self.socket.identity = self.identity.encode()
        self.socket.curve_serverkey = keys.public(folder / "server.key")
        pair = keys.pair(folder / "workers" / f"{name}.key_secret")
        self.socket.curve_publickey, self.socket.curve_secretkey = pair
        self.socket.connect(address)
        self._ahead = ahead

    def now(self) -> float:
        return time.monotonic() + self._ahead

    def send(self, message: ToLeader, *frames: bytes) -> None:
        self.socket.send_multipart([encode(message), *frames])

    def hello(self, device: str = "cpu:0") -> None:
        self.send(Hello(VERSION, 1, "faked", device))

    def receive(self) -> tuple[ToWorker, list[bytes]]:
        """Return the next message and its frames; answer pings in between."""
        while self.socket.poll(round(DEADLINE * 1000)):
            head, *frames = self.socket.recv_multipart()
            message = decode(head, TO_WORKER)
            if not isinstance(message, Ping):
                return message, frames
            self.send(Pong(message.sent, self.now()))
        raise AssertionError("no message in time")

    def close(self) -> None:
        self._context.destroy(linger=0)
