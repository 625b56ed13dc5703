"""Clients that leave, stop reading or ask for too much, and a server that ends."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch

from drp import Client, Leader
from drp.client import RefusedError
from drp.errors import WorkerError
from drp.server import clients
from tests.plain_client import Plain
from tests.serving import DEADLINE, LONG, ROOT, Served, serving
from tests.waiting import until


def test_more_than_it_takes_is_refused(client: Client) -> None:
    runs = [client.submit(labels=[1], **LONG) for _ in range(20)]
    refused = 0
    for run in runs[16:]:
        with pytest.raises(RefusedError, match="as many as this server takes") as error:
            run.result(DEADLINE)
        refused += error.value.code == "busy"
    for run in runs:
        run.cancel()
    assert refused == 4
    for run in runs[:16]:
        with pytest.raises(CancelledError):
            run.result(DEADLINE)


def test_the_runs_of_a_killed_client_are_cancelled(served: Served, client: Client) -> None:
    program = [sys.executable, str(ROOT / "tests" / "plain_client.py"), served.address]
    before = client.status()
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "accepted\n"
        assert client.status().requests == 1
        killed.kill()
        until(lambda: client.status().requests == 0, "the run of the killed client is cancelled")
    assert client.status().cancelled == before.cancelled + 1
    until(lambda: client.status().clients == 1, "the killed client is forgotten")


def test_memory_for_a_client_that_is_gone_is_given_back(served: Served, client: Client) -> None:
    gone = Plain(served.address)
    gone.open()
    gone.submit(1, labels=[1], steps=2, memory=True)
    gone.receive("Accepted")
    gone.receive("Finished")
    until(lambda: served.memory() == served.idle + 2, "what is left is the result's memory, and its mapping")
    gone.close()
    until(lambda: served.memory() == served.idle, "the memory of the result is closed too")


def test_memory_that_is_not_taken_is_given_back(free: Leader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "ACK_TIMEOUT", 0.1)
    with serving(free, tmp_path) as server:
        plain = Plain(server.address)
        plain.open()
        plain.submit(1, shape=(8, 8), steps=2, memory=True)
        plain.receive("Accepted")
        path = "/proc/{pid}/fd/{fd}".format(**plain.receive("Finished")["samples"]["memory"])
        until(lambda: "drp_untaken_results_total 1" in server.metrics(), "it was given back")
        assert not os.path.exists(path) or "memfd" not in os.readlink(path)  # noqa: PTH110, PTH115  # not files
        plain.close()


def test_a_client_that_does_not_read_is_dropped(free: Leader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "SILENCE_TIMEOUT", 0.2)
    with serving(free, tmp_path, max_requests=1000) as server:
        deaf = Plain(server.address, hwm=1)
        deaf.open()
        for request in range(300):
            deaf.submit(request, shape=(8, 8), count=128, steps=1)
        with Client(server.address) as client:
            until(lambda: client.status().clients == 1, "the client that does not read is forgotten")
            until(lambda: client.status().requests == 0, "and so are its runs")
            assert client.sample(shape=(8, 8), steps=3).rounds == 2
        deaf.close()


def test_a_client_hears_of_a_server_that_is_gone(tmp_path: Path, free: Leader) -> None:
    with serving(free, tmp_path) as server:
        client = Client(server.address)
        run = client.submit(shape=(8, 8), **LONG)
        assert client.status().requests == 1
        server.drain(0.0)
        with pytest.raises(RefusedError, match="the server ended first"):
            run.result(DEADLINE)
    with pytest.raises(ConnectionError):
        until(lambda: client.status() is None, "the connection is closed")
    client.close()
    with pytest.raises(ConnectionError, match=r"no server answers at ipc://.* within 0\.2 s"):
        Client(server.address, timeout=0.2)


def test_a_drain_finishes_what_there_is(free: Leader, tmp_path: Path) -> None:
    with serving(free, tmp_path) as server, Client(server.address) as client:
        run = client.submit(shape=(8, 8), steps=200, progress=True)
        next(run.progress())
        server.drain(DEADLINE)
        with pytest.raises(RefusedError, match="draining"):
            client.sample(shape=(8, 8))
        assert client.status().state == "draining"
        assert torch.equal(run.result(DEADLINE).samples, free.sample(shape=(8, 8), steps=200).samples)


def test_a_lost_leader_ends_the_server(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack, Leader("tests.denoisers:Tiny") as leader:
        server = stack.enter_context(serving(leader, tmp_path))
        client = stack.enter_context(Client(server.address))
        run = client.submit(labels=[1], **LONG, progress=True)
        next(run.progress())
        leader.close()
        with pytest.raises(RefusedError, match="the server ended first"):
            run.result(DEADLINE)
        with pytest.raises(WorkerError, match="all clients were notified"):
            stack.close()
