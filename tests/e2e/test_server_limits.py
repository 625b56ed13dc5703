"""What one client can ask for, leave unread or hold open, and that others are served meanwhile."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from drp import Client, Leader
from drp.client import RefusedError
from drp.protocol.keys import Keys, make
from drp.server import clients
from drp.server.endpoint import check_descriptors
from tests.plain_client import Plain
from tests.serving import Served, serving
from tests.waiting import until

BIG = 2**31 - 1


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server with few descriptors, of which it may have more, and few clients."""
    folder = tmp_path_factory.mktemp("limits")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        server = Served(folder, "-d", "1", "--max-clients", "4")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield server
        status, errors = server.end()
        assert status == 0
        assert "24 connections are open; those beyond are closed" in errors
    finally:
        server.process.kill()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target_speedup": 1e300, "drafts": BIG}, "drafts is 2147483647; give a whole number, 1 to 256"),
        ({"count": 3_000_000, "shape": [1]}, "count is 3000000; give a whole number, 1 to 16384"),
        ({"sweeps": BIG}, "sweeps is 2147483647; give a whole number, 0 to"),
        ({"warmup": BIG}, "warmup is 2147483647; give a whole number, 0 to"),
        ({"guidance": 1e308}, "guidance is 1e+308; give a number"),
        ({"steps": 10_000, "mode": "rolling", "drafts": 1024}, "steps is 10000"),
        ({"steps": 48, "mode": "rolling", "drafts": 1024}, "drafts is 1024"),
        ({"count": 0, "shape": [BIG, BIG, BIG, 4]}, "give sizes from 1"),
        ({"shape": [0, BIG, BIG, BIG]}, "give sizes from 1"),
        ({"shape": [BIG, BIG]}, "ask for fewer"),
        ({"mode": "nonsense"}, "unknown mode"),
        ({"solver": "zzz"}, "unknown solver"),
        ({"noise": {"dtype": "float32", "shape": [4], "frame": 1, "memory": None}}, "frame 1 is missing"),
    ],
)
def test_what_is_refused_takes_no_time_and_leaves_nothing(
    free: Leader, tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    with serving(free, tmp_path) as server:
        plain = Plain(server.address)
        plain.open()
        before = len(list(Path("/proc/self/fd").iterdir()))
        for request in range(5):
            plain.submit(request, **{"shape": [4], "memory": True, **fields})
            assert reason in plain.receive("Refused")["reason"]
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        plain.close()


def test_a_client_that_does_not_read_is_no_other_clients_matter(
    free: Leader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "MAX_UNSENT", 100)
    with serving(free, tmp_path, max_requests=2) as server, Client(server.address) as client:
        deaf = Plain(server.address, hwm=1)
        deaf.open()
        for _ in range(1000):
            deaf.send("Query", what="metrics")
        for _ in range(3):
            assert client.sample(shape=(4,), steps=3).steps == 3  # and is not refused as one too many
        until(lambda: client.status().clients == 1, "the client that does not read is forgotten")
        deaf.close()


def test_results_that_a_client_leaves_count_against_its_own_share(free: Leader, tmp_path: Path) -> None:
    with serving(free, tmp_path, max_requests=2) as server, Client(server.address) as client:
        plain = Plain(server.address)
        plain.open()
        for request in range(2):
            plain.submit(request, shape=[4], steps=2, memory=True)
            plain.receive("Accepted")
            plain.receive("Finished")
        plain.submit(2, shape=[4], steps=2)
        assert "read those first" in plain.receive("Refused")["reason"]
        assert client.sample(shape=(4,), steps=3).steps == 3
        plain.send("Ack", request=0)
        plain.submit(2, shape=[4], steps=2)
        plain.receive("Accepted")
        plain.receive("Finished")
        plain.close()


def test_what_is_kept_for_clients_is_bounded_in_bytes(
    free: Leader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clients, "MAX_BYTES", 10 << 20)
    with serving(free, tmp_path) as server, Client(server.address) as client:
        plain = Plain(server.address)
        plain.open()
        for request in range(3):  # of 4 MiB each, which it does not take
            plain.submit(request, shape=[1 << 20], steps=1, memory=True)
        until(lambda: client.status().clients == 1, "the client that takes nothing is forgotten")
        assert client.sample(shape=(4,), steps=3).steps == 3
        plain.close()


def test_the_server_may_have_as_many_descriptors_as_there_are(served: Served) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits = Path(f"/proc/{served.process.pid}/limits").read_text()
    [line] = [line for line in limits.splitlines() if line.startswith("Max open files")]
    assert line.split()[3] == str(hard)


def test_more_clients_than_it_takes_are_told_so(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        here = [stack.enter_context(Client(served.address)) for _ in range(4)]
        with pytest.raises(RefusedError, match="4 clients are connected, as many as this server takes") as error:
            Client(served.address)
        assert error.value.code == "busy"
        assert here[0].sample(labels=[1], steps=3).steps == 3
        here[1].close()
        until(lambda: here[0].status().clients == 3, "the client that has left is forgotten")
        stack.enter_context(Client(served.address))


def test_more_connections_than_it_takes_are_closed(served: Served) -> None:
    """One program of the same user holds hundreds open: libzmq would abort a server without descriptors."""
    path = served.address.removeprefix("ipc://")
    with Client(served.address) as client, contextlib.ExitStack() as stack:
        for _ in range(300):
            until(lambda: stack.enter_context(socket.socket(socket.AF_UNIX)).connect_ex(path) == 0, "connected")
        assert client.sample(labels=[1], steps=3).steps == 3
        until(lambda: served.descriptors() < 100, "connections beyond the limit are closed")
        assert client.sample(labels=[1], steps=3).steps == 3
    until(lambda: served.descriptors() < 50, "all connections are closed")


def test_a_client_waits_while_a_server_has_too_many_connections(served: Served) -> None:
    """Those that say nothing are closed after 5 s."""
    path = served.address.removeprefix("ipc://")
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            until(lambda: stack.enter_context(socket.socket(socket.AF_UNIX)).connect_ex(path) == 0, "connected")
        until(lambda: served.descriptors() < 100, "connections beyond the limit are closed")
        with Client(served.address, timeout=30) as client:
            assert client.sample(labels=[1], steps=3).steps == 3


UNREAD = """
import sys, time, zmq
from drp.protocol.endpoint import Endpoint

endpoint = Endpoint("ipc://" + sys.argv[1])
peer = zmq.Context().socket(zmq.DEALER)
peer.linger = 0
peer.connect(endpoint.address)
for _ in range(500):
    peer.send(b"x" * 2000)
time.sleep(0.2)
peer.close()
time.sleep(1.2)
while endpoint.socket.poll(100):
    assert endpoint.receive() is not None
endpoint.close()
"""


def test_a_connection_that_breaks_with_messages_unread_ends_nothing(tmp_path: Path) -> None:
    """libzmq aborted the process here, for as long as it was to send ZMTP heartbeats every second."""
    tmp_path.chmod(0o700)
    ended = subprocess.run(
        [sys.executable, "-c", UNREAD, str(tmp_path / "server")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_what_an_error_says_is_told_whatever_it_says(free: Leader, tmp_path: Path) -> None:
    """A file name that cannot be decoded has lone surrogates, which no message can hold."""
    with serving(free, tmp_path) as server, Client(server.address) as client, pytest.MonkeyPatch.context() as patched:

        def refuse(**options: Any) -> None:
            raise ValueError("no file \udcff.bin")

        patched.setattr(free, "submit", refuse)
        with pytest.raises(ValueError, match=r"no file \\udcff\.bin"):
            client.sample(shape=(4,), steps=3)
        patched.undo()
        assert client.sample(shape=(4,), steps=3).steps == 3


def test_a_limit_that_there_are_no_descriptors_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 1024))
    assert check_descriptors(248) == 512
    with pytest.raises(ValueError, match=r"max_clients is 249, which takes .* may have 1024; lower it, or raise"):
        check_descriptors(249)


@pytest.mark.parametrize(
    "content",
    ["nonsense", 'metadata\ncurve\n    public-key = "short"\n', 'public-key = "' + "ä" * 40 + '"', "public-key"],
)
def test_a_broken_key_of_one_client_is_named_at_the_start(tmp_path: Path, content: str) -> None:
    """Later it would keep every client out."""
    make(tmp_path, ["anna"])
    assert [*Keys.read(tmp_path).peers.values()] == ["anna"]
    broken = tmp_path / "clients" / "broken.key"
    broken.write_text(content)
    with pytest.raises(ValueError, match=f"no key in {broken}: .*`drp keys` makes them, or remove the file"):
        Keys.read(tmp_path)
    broken.unlink()
    (tmp_path / "clients" / "folder.key").mkdir()
    with pytest.raises(ValueError, match=r"no key in .*folder\.key"):
        Keys.read(tmp_path)


def test_keys_without_clients_are_refused(tmp_path: Path) -> None:
    make(tmp_path, [])
    (tmp_path / "clients").rmdir()
    with pytest.raises(ValueError, match="clients is not a directory with the public keys of clients"):
        Keys.read(tmp_path)
