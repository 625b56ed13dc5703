"""A client written from drp/protocol/SPEC.md alone, with nothing of drp: zmq, msgpack and the standard library.

Run as a program it submits a long run and waits, to be killed: `python tests/plain_client.py ADDRESS`.
"""

from __future__ import annotations

import array
import mmap
import os
import sys
import time
from typing import Any

import msgpack
import zmq

DEADLINE = 20.0

DEFAULTS: dict[str, Any] = {
    "labels": None,
    "count": None,
    "shape": None,
    "cond": [],
    "guidance": None,
    "steps": 48,
    "solver": "ddim",
    "solver_options": [],
    "grid": [],
    "prediction_type": "epsilon",
    "noise": None,
    "image": None,
    "strength": 1.0,
    "mode": "window",
    "drafts": None,
    "target_speedup": None,
    "target_rounds": None,
    "stride": None,
    "offsets": None,
    "rule": None,
    "tolerance": 0.0025,
    "warmup": 0,
    "sweeps": 0,
    "seed": 0,
    "residuals": False,
    "progress": False,
    "previews": 0,
    "timeline": False,
    "memory": False,
}

Message = dict[str, Any]


class Plain:
    """A DEALER and a way to read what comes; `receive` leaves Beats out."""

    def __init__(self, address: str, hwm: int = 1000) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, hwm)
        self.socket.connect(address)
        self.frames: list[bytes] = []

    def send(self, kind: str, *frames: bytes, **fields: Any) -> None:
        self.socket.send_multipart([msgpack.packb({"type": kind, **fields}), *frames])

    def submit(self, request: int, *frames: bytes, **options: Any) -> None:
        self.send("Submit", *frames, request=request, **DEFAULTS | options)

    def receive(self, *kinds: str) -> Message:
        """Return the next message, which must be of one of these kinds; its tensor frames are in `frames`."""
        deadline = time.monotonic() + DEADLINE
        while True:
            if not self.socket.poll(max(0, round((deadline - time.monotonic()) * 1000))):
                raise TimeoutError(f"nothing came where {kinds} was due")
            head, *self.frames = self.socket.recv_multipart()
            message: Message = msgpack.unpackb(head)
            if message["type"] != "Heartbeat":
                assert not kinds or message["type"] in kinds, message
                return message

    def open(self) -> Message:
        self.send("Open", version=3, name="plain")
        return self.receive("Welcome")

    def floats(self, tensor: Message) -> list[float]:
        """Return the numbers of a float32 tensor of the message received last."""
        assert tensor["dtype"] == "float32"
        if tensor["frame"] is not None:
            return list(array.array("f", self.frames[tensor["frame"] - 1]))
        handle = tensor["memory"]
        fd = os.open(f"/proc/{handle['pid']}/fd/{handle['fd']}", os.O_RDWR)
        assert os.fstat(fd).st_size == handle["nbytes"]
        count = 1
        for size in tensor["shape"]:
            count *= size
        with mmap.mmap(fd, handle["nbytes"]) as memory:
            os.close(fd)
            return list(array.array("f", memory[: 4 * count]))

    def close(self) -> None:
        self.context.destroy(linger=0)


if __name__ == "__main__":
    client = Plain(sys.argv[1])
    client.open()
    client.submit(1, labels=[1], steps=900, sweeps=100)
    client.receive("Accepted")
    sys.stdout.write("accepted\n")
    sys.stdout.flush()
    client.receive("Finished")
