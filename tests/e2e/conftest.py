"""Fixtures of the tests that start whole programs: a server, and clients connected to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from drp import Client
from tests.gateway import Gateway
from tests.plain_client import Plain
from tests.serving import Served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("serve"), "-d", "2", "--max-requests", "16")
    try:
        assert server.first_line == f"serving tests.denoisers:Tiny on cpu:0, cpu:1 at {server.address}\n"
        yield server
        assert server.end() == (0, "")
        assert not Path(server.address.removeprefix("ipc://")).exists()
    finally:
        server.process.kill()


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address) as client:
        yield client


@pytest.fixture
def plain(served: Served) -> Iterator[Plain]:
    plain = Plain(served.address)
    yield plain
    plain.close()


@pytest.fixture(scope="module")
def gateway(served: Served) -> Iterator[Gateway]:
    gateway = Gateway("-c", served.address)
    yield gateway
    status, errors = gateway.end()
    assert (status, errors) == (0, "")
