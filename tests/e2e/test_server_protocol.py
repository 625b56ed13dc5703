"""The server and a client written from the specification alone, and refusals of other versions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import zmq

import drp
from drp import Client
from drp.client import RefusedError
from tests.plain_client import Plain
from tests.serving import DEADLINE, LONG
from tests.unit.test_spec import facts, lines


def test_plain_samples_are_the_same_bits(plain: Plain) -> None:
    expected = drp.reference("tests.denoisers:Tiny", labels=[3, 1], steps=8, seed=2, devices=2)
    opened = plain.open()
    assert opened["spec"] == {"sample_shape": [1, 8, 8], "classes": 10, "guidance": None}
    for request, memory in ((0, False), (1, True)):
        plain.submit(request, labels=[3, 1], steps=8, seed=2, memory=memory)
        assert plain.receive("Accepted") == {"type": "Accepted", "request": request, "ahead": 0}
        finished = plain.receive("Finished")
        assert finished["request"] == request
        assert finished["samples"]["shape"] == [2, 1, 8, 8]
        assert (finished["samples"]["memory"] is not None) == memory
        assert plain.floats(finished["samples"]) == expected.samples.flatten().tolist()
        assert (finished["rounds"], finished["evaluations"]) == (expected.rounds, expected.evaluations)
    plain.send("Ack", request=1)


def test_plain_progress_tensors_and_cancel(plain: Plain) -> None:
    plain.open()
    noise = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    tensor = {"dtype": "float32", "shape": [1, 1, 8, 8], "frame": 1, "memory": None}
    plain.submit(4, noise.numpy().tobytes(), labels=[2], steps=6, noise=tensor, previews=1)
    plain.receive("Accepted")
    last = None
    while (message := plain.receive("Progress", "Finished"))["type"] == "Progress":
        last = plain.floats(message["preview"]) if message["preview"] else last
    expected = drp.reference("tests.denoisers:Tiny", labels=[2], steps=6, devices=2, noise=noise).samples
    assert plain.floats(message["samples"]) == last == expected.flatten().tolist()
    plain.submit(4, labels=[1], **LONG)
    plain.receive("Accepted")
    plain.send("Cancel", request=4)
    assert plain.receive("Ended")["code"] == "cancelled"
    plain.send("Cancel", request=4)  # There is no such request any more: no answer.
    plain.send("Query", what="status")
    assert plain.receive("Status")["requests"] == 0


def test_plain_refusals(plain: Plain) -> None:
    plain.send("Query", what="status")
    assert "before Open" in plain.receive("Refused")["reason"]
    plain.send("Open", version=99, name="from the future")
    refused = plain.receive("Refused")
    assert (refused["code"], refused["request"]) == ("version", None)
    assert "version 3" in refused["reason"]
    plain.open()
    plain.submit(1, labels=[77])
    refused = plain.receive("Refused")
    assert (refused["code"], refused["request"]) == ("invalid", 1)
    for frames, tensor in (
        ([], {"frame": 1}),
        ([b"12"], {"frame": 1}),
        ([b"1234", b"1234"], {"frame": 1}),
        ([b"1234"], {"frame": 2}),
        ([b"1234"], {"frame": 1, "dtype": "object"}),
        ([b"1234"], {"frame": 1, "memory": {"pid": 1, "fd": 1, "nbytes": 4}}),
    ):
        given = {"dtype": "float32", "shape": [1], "memory": None, **tensor}
        plain.submit(1, *frames, labels=[1], cond=[{"name": "c", "tensor": given}])
        refused = plain.receive("Refused")
        assert (refused["code"], refused["request"]) == ("protocol", 1), frames
    plain.send("Cancel", b"surplus", request=1)
    assert plain.receive("Refused")["code"] == "protocol"
    for kind, change in (("Submit", {"steps": 10**6}), ("Cancel", {})):
        plain.send(kind, **{"request": 1, **change, "surplus": 1})
        assert plain.receive("Refused")["code"] == "protocol"
    plain.submit(1, labels=[1], steps=3)  # The session goes on.
    plain.receive("Accepted")
    plain.receive("Finished")


def test_what_must_be_refused_is_and_the_server_goes_on(plain: Plain) -> None:
    plain.open()
    directions = {name: data for name, data in lines("refused").items() if name.split("/")[0] in ("client", "any")}
    for name, data in directions.items():
        plain.socket.send(data)
        assert plain.receive()["type"] == "Refused", (name, facts("refused")[name])
    plain.send("Query", what="metrics")
    assert f"drp_bad_messages_total {len(directions)}" in plain.receive("Metrics")["text"] or len(directions) > 5


def test_a_number_in_use_is_refused(plain: Plain) -> None:
    plain.open()
    plain.submit(1, labels=[1], **LONG)
    plain.receive("Accepted")
    plain.submit(1, labels=[1])
    refused = plain.receive("Refused")
    assert (refused["code"], refused["request"]) == ("protocol", None)
    plain.send("Cancel", request=1)
    plain.receive("Ended")


OPENED = {
    "type": "Welcome",
    "version": 3,
    "model": "m",
    "spec": {"sample_shape": [1], "classes": None, "guidance": None},
    "devices": ["cpu:0"],
    "max_requests": 1,
}


def another_version(address: str, *answers: dict[str, Any]) -> None:
    """Answer so many messages of one client, as a server of a version that is not this one."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 1000
        socket.bind(address)
        for answer in answers:
            assert socket.poll(round(DEADLINE * 1000))
            client, *_ = socket.recv_multipart()
            socket.send_multipart([client, msgpack.packb(answer)])


@pytest.mark.parametrize("code", ["elsewhere", "cancelled"])  # a new word, and one that means an end, not a refusal
def test_a_refusal_with_a_code_that_is_not_known(tmp_path: Path, code: str) -> None:
    refused = {"type": "Refused", "request": None, "code": code, "reason": "ask another server"}
    with ThreadPoolExecutor(1) as pool:
        server = pool.submit(another_version, f"ipc://{tmp_path}/first", refused)
        with pytest.raises(RefusedError, match=f"^{code}: ask another server$") as error:
            Client(f"ipc://{tmp_path}/first")
        assert error.value.code == code
        server.result(DEADLINE)
        server = pool.submit(another_version, f"ipc://{tmp_path}/second", OPENED, refused | {"request": 1})
        with Client(f"ipc://{tmp_path}/second") as client:
            with pytest.raises(RefusedError, match="ask another server") as error:
                client.submit(steps=2).result(DEADLINE)
            assert error.value.code == code
        server.result(DEADLINE)
