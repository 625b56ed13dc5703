"""Transport: how long a message takes to a worker process and back, and how long it takes to send a round's drafts."""

import multiprocessing
import os
from collections.abc import Iterator
from socket import socket as Socket

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from drp.protocol.codec import encode
from drp.protocol.messages import Draft, Hello, Prediction, Stop
from drp.protocol.transport import LeaderSocket, WorkerSocket
from tests.leader_socket import receive_one

DEADLINE = 30.0
WORKERS = 8


def echo(listener: Socket, leader: int) -> None:
    """Answer drafts until Stop."""
    socket = WorkerSocket(listener.detach(), leader)
    socket.send(Hello(1, 1))
    while not isinstance(message := socket.receive(DEADLINE), Stop) and message is not None:
        assert isinstance(message, Draft)
        socket.send(Prediction(message.run, message.index, message.slot, 0.0))
    socket.close()


@pytest.fixture
def leader() -> Iterator[LeaderSocket]:
    """Open a leader's socket."""
    socket = LeaderSocket()
    yield socket
    socket.close()


def test_round_trip(benchmark: BenchmarkFixture, leader: LeaderSocket) -> None:
    """A Draft to another process, a Prediction back."""
    listener = leader.invite(b"echo")
    process = multiprocessing.get_context("spawn").Process(target=echo, args=(listener, os.getpid()), daemon=True)
    process.start()
    listener.close()
    receive_one(leader, DEADLINE)

    def there_and_back() -> object:
        leader.send(b"echo", encode(Draft(0, 1, 999.0, 1, 1)))
        return receive_one(leader, DEADLINE)

    assert benchmark(there_and_back) == (b"echo", Prediction(0, 1, 1, 0.0))
    leader.send(b"echo", encode(Stop()))
    process.join(DEADLINE)


def test_dispatch_to_8_workers(benchmark: BenchmarkFixture, leader: LeaderSocket) -> None:
    """Encode and send a round's drafts; the workers' sockets take them before the next round."""
    sockets = [WorkerSocket(leader.invite(b"%d" % number).detach(), os.getpid()) for number in range(WORKERS)]
    for socket in sockets:
        socket.send(Hello(1, 1))
        receive_one(leader, DEADLINE)
    sent = 0

    def dispatch() -> None:
        nonlocal sent
        for number in range(WORKERS):
            leader.send(b"%d" % number, encode(Draft(0, number, 999.0, number, number)))
        sent += 1

    def take() -> None:
        nonlocal sent
        for _ in range(sent):
            for number, socket in enumerate(sockets):
                assert socket.receive(DEADLINE) == Draft(0, number, 999.0, number, number)
        sent = 0

    benchmark.pedantic(dispatch, setup=take, rounds=500)  # type: ignore[no-untyped-call]
    take()
    for socket in sockets:
        socket.close()
