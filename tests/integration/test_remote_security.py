"""The socket at which workers dial in: strangers, known keys under other names, garbage and floods are kept out."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import drp
from drp import Leader, RemoteWorkers
from drp.errors import ProtocolError
from drp.leader.supervision.remote import RemoteBackend
from drp.protocol.codec import decode
from drp.protocol.dial import DialedSocket, WorkerKeys
from drp.protocol.keys import make
from drp.protocol.messages import TO_LEADER, Bind, Draft, Hello, Load, Loaded, ModelSpec, Prediction, Rejected
from tests.faults.test_wire import mutated
from tests.remote import DEADLINE, FakeWorker, ending, free_address, start_worker
from tests.waiting import until

MODEL = "tests.denoisers:make_slow_sine"
OPTIONS: dict[str, Any] = {"shape": (64,), "steps": 60, "mode": "sequential"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("keys")
    make(made, [], ["anna", "berta"])
    return made


@pytest.fixture(scope="module")
def leader(folder: Path) -> Iterator[Leader]:
    address = free_address()
    with (
        ending([start_worker(address, folder, "anna")]),
        Leader(MODEL, devices=RemoteWorkers(1, address, folder)) as leader,
    ):
        yield leader
        assert leader.workers[0].losses == 0, leader.workers[0].last_failure


@pytest.fixture
def backend(leader: Leader) -> RemoteBackend:
    found = leader.internals.pool.remote
    assert found is not None
    return found


@pytest.fixture
def undisturbed(leader: Leader) -> Iterator[None]:
    """A run goes on meanwhile, and has the bits that it would have had alone."""
    run = leader.submit(**OPTIONS)
    yield
    result = run.result(DEADLINE)
    assert torch.equal(result.samples, drp.reference(MODEL, **OPTIONS).samples)
    assert result.incidents == ()


def refused(address: str, keys: WorkerKeys | None) -> str:
    with pytest.raises((PermissionError, TimeoutError)) as error:
        DialedSocket(address, keys, 3.0, lambda: None)
    return str(error.value)


@pytest.mark.usefixtures("undisturbed")
def test_strangers_are_not_let_in(backend: RemoteBackend, folder: Path, tmp_path: Path) -> None:
    make(tmp_path, [], ["anna"])
    unknown = WorkerKeys.read(tmp_path / "workers" / "anna.key_secret", folder / "server.key")
    assert refused(backend.address, unknown) == f"the leader at {backend.address} does not know this worker's key"
    assert "encrypts" in refused(backend.address, None)
    elsewhere = WorkerKeys.read(folder / "workers" / "anna.key_secret", tmp_path / "server.key")
    assert "has another key than server.key says" in refused(backend.address, elsewhere)


@pytest.mark.usefixtures("undisturbed")
def test_a_known_key_under_another_name_is_rejected(backend: RemoteBackend, folder: Path) -> None:
    worker = FakeWorker(backend.address, folder, "berta", identity="anna-0123")
    worker.hello()
    message, _ = worker.receive()
    assert message == Rejected("its identity does not begin with 'berta', the name of its key")
    worker.close()


@pytest.mark.usefixtures("undisturbed")
def test_the_identity_of_another_worker_is_of_no_use(backend: RemoteBackend, folder: Path) -> None:
    """ZeroMQ lets nobody have an identity that another connection has."""
    (peer,) = backend._connected
    worker = FakeWorker(backend.address, folder, "berta", identity=peer.decode())
    worker.hello()
    for row in range(4):
        worker.send(Prediction(0, row, row, 0.1), bytes(256))
    assert not worker.socket.poll(500)
    worker.close()


@pytest.mark.usefixtures("undisturbed")
def test_a_worker_that_was_not_let_in_or_is_no_longer_one_is_turned_away(backend: RemoteBackend, folder: Path) -> None:
    worker, dropped = FakeWorker(backend.address, folder, "berta"), backend.dropped
    worker.send(Loaded(ModelSpec(), 0, "", "", ""))
    message, _ = worker.receive()
    assert isinstance(message, Rejected)
    assert "it is not a worker of this leader, or no longer; start it anew" in message.reason
    worker.send(Hello(1, 1))
    assert worker.receive()[0] == Rejected("it speaks version 1 of the protocol, the leader 9")
    assert backend.dropped == dropped + 2
    worker.close()


@pytest.mark.usefixtures("undisturbed")
def test_garbage_of_a_known_key_is_dropped(backend: RemoteBackend, folder: Path) -> None:
    draws, dropped = random.Random(1), backend.dropped
    worker = FakeWorker(backend.address, folder, "berta")
    sent = 0
    for _ in range(300):
        data = mutated(draws)
        if not is_hello(data):
            worker.socket.send_multipart([data] if draws.random() < 0.8 else [data, b"", data])
            sent += 1
    until(lambda: backend.dropped > dropped + sent // 2, "most of it is no message of a stranger's")
    worker.close()


def is_hello(data: bytes) -> bool:
    try:
        return isinstance(decode(data, TO_LEADER), Hello)
    except ProtocolError:
        return False


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE".ljust(24, b"\0") + bytes(32)
"""Of ZMTP 3.1, signature, version and mechanism, as a client's."""


@pytest.mark.usefixtures("undisturbed")
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: leader\r\n\r\n" * 10,
        GREETING + b"\x06" + (2**40).to_bytes(8, "big") + b"\x05HELLO" * 10,  # a command of a tebibyte
        GREETING + b"\x04\xc8" + bytes(200),  # as long as HELLO, and nonsense
    ],
)
def test_bytes_of_a_stranger_end_the_connection(backend: RemoteBackend, data: bytes) -> None:
    before = psutil.Process().memory_info().rss
    with socket.create_connection(("127.0.0.1", int(backend.address.rpartition(":")[2])), DEADLINE) as stranger:
        stranger.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(4096):
                pass
    assert psutil.Process().memory_info().rss - before < 64 << 20


@pytest.mark.usefixtures("undisturbed")
def test_a_flood_of_connections_is_closed(backend: RemoteBackend, caplog: pytest.LogCaptureFixture) -> None:
    port, before = int(backend.address.rpartition(":")[2]), psutil.Process().num_fds()
    flood = [socket.create_connection(("127.0.0.1", port), DEADLINE) for _ in range(100)]
    until(lambda: "18 connections are open; those beyond are closed" in caplog.text, "the flood is noticed")
    until(lambda: psutil.Process().num_fds() - before < 100 + 50, "those beyond the limit are closed")
    for each in flood:
        each.close()
    until(lambda: psutil.Process().num_fds() - before < 10, "all are closed")


def answering(worker: FakeWorker, answer: Callable[[FakeWorker, Bind, Draft, list[bytes]], None]) -> threading.Thread:
    """Serve a leader by hand until a first draft has been answered in some way."""

    def serve() -> None:
        worker.hello()
        while True:
            match worker.receive():
                case Load(), _:
                    worker.send(Loaded(ModelSpec(), 0, LAYOUT, "", EMPTY))
                case Bind() as bind, _:
                    pass
                case Draft() as draft, frames:
                    return answer(worker, bind, draft, frames)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


LAYOUT = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
"""Digest of a layout without weights."""
EMPTY = "cae66941d9efbd404e4d88758ea67670"
"""Digest of no weights."""


def test_a_frame_that_is_not_as_long_as_its_row_ends_the_worker_and_not_the_run(folder: Path) -> None:
    address, run = free_address(), {"shape": (64,), "steps": 12, "mode": "aggressive"}
    expected = drp.reference("tests.denoisers:make_free", devices=2, **run).samples  # type: ignore[arg-type]  # options
    wrong: tuple[tuple[list[bytes], str], ...] = (
        ([bytes(257)], r"frames of \[257\] bytes, where \[256\] are due"),
        ([bytes(8 << 20)], r"frames of \[8388608\] bytes, where \[256\] are due"),
        ([], r"frames of \[\] bytes, where \[256\] are due"),
        ([bytes(256)] * 2, r"frames of \[256, 256\] bytes"),
    )

    def dial(number: int) -> tuple[FakeWorker, threading.Thread]:
        def answer(worker: FakeWorker, bind: Bind, draft: Draft, _: list[bytes]) -> None:
            worker.send(Prediction(bind.run, draft.index, draft.row, 0.1), *wrong[number][0])

        worker = FakeWorker(address, folder, "anna")
        return worker, answering(worker, answer)

    worker, thread = dial(0)
    with Leader("tests.denoisers:make_free", devices=["cpu:0", RemoteWorkers(1, address, folder)]) as leader:
        for number, (_, words) in enumerate(wrong):
            if number:
                worker, thread = dial(number)
                until(lambda: leader.workers[1].state == "ready", "another has taken the lost one's place")
            result = leader.sample(**run)  # type: ignore[arg-type]  # options
            thread.join(DEADLINE)
            message, _ = worker.receive()
            worker.close()
            assert torch.equal(result.samples, expected)
            lost = rf"worker 1 \(faked/cpu:0, process 1\) failed sending a message: .*{words}"
            assert re.search(lost, result.incidents[0])
            assert isinstance(message, Rejected)


def test_a_prediction_that_is_not_owed_is_written_nowhere_and_clocks_that_differ_are_told_apart(folder: Path) -> None:
    address, ahead = free_address(), 1000.0
    worker = FakeWorker(address, folder, "anna", ahead=ahead)
    evaluate = torch.sin

    def answer(w: FakeWorker, bind: Bind, draft: Draft, frames: list[bytes]) -> None:
        x, now = torch.frombuffer(bytearray(frames[0]), dtype=torch.float32), w.now()
        made = (evaluate(x) * (1 - draft.timestep / 2000)).numpy().tobytes()
        w.send(Prediction(0, draft.index, draft.row, 0.1, now, now, now, now), made)
        w.send(Prediction(0, draft.index, draft.row, 0.1), made)  # once more

    thread = answering(worker, answer)
    with Leader("tests.denoisers:make_free", devices=["cpu:0", RemoteWorkers(1, address, folder)]) as leader:
        leader.timeline = []
        result = leader.sample(shape=(64,), steps=12, mode="aggressive")
        thread.join(DEADLINE)
        (event,) = [event for event in leader.timeline if event.kind == "predicted" and event.worker == 1]
    assert event.times is not None
    assert abs(event.times[1] - event.ns / 1e9) < 10
    expected = drp.reference("tests.denoisers:make_free", devices=2, shape=(64,), steps=12, mode="aggressive")
    assert torch.equal(result.samples, expected.samples)
    assert re.search(r"worker 1 .* failed sending a message: .* answers no draft", result.incidents[0])
    worker.close()
