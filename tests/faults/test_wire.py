"""Hostile bytes: a million for the decoder, and a flood for a leader that is at work."""

from __future__ import annotations

import random
import resource
import time
from pathlib import Path

import pytest
import torch

import drp
from drp import Leader
from drp.errors import ProtocolError
from drp.protocol import client_messages
from drp.protocol.codec import MAX_MESSAGE, decode, encode
from drp.protocol.messages import TO_LEADER, TO_WORKER
from tests.integration.test_lost_workers import python
from tests.vectors.examples import PROTOCOLS, examples

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

INPUTS = 1_000_000
KINDS = (TO_LEADER, TO_WORKER, client_messages.TO_CLIENT, client_messages.TO_SERVER)
SEEDS = tuple(encode(message) for protocol in PROTOCOLS for message in examples(protocol).values())
MEMORY = 64 * 1024  # KiB that decoding may take beyond what there was


def mutated(draws: random.Random) -> bytes:
    """Return a message that was cut, spliced, or had bytes changed, put in or taken out; or bytes of no message."""
    if draws.random() < 0.1:
        return draws.randbytes(draws.randrange(64))
    data = bytearray(draws.choice(SEEDS))
    for _ in range(draws.choice((1, 1, 2, 4, 16))):
        at = draws.randrange(len(data) + 1)
        match draws.randrange(6):
            case 0 if at < len(data):
                data[at] = draws.randrange(256)
            case 1 if at < len(data):
                data[at] ^= 1 << draws.randrange(8)
            case 2:
                data[at:at] = draws.randbytes(draws.choice((1, 2, 4, 8)))
            case 3:
                del data[at : at + draws.choice((1, 2, 8, 64))]
            case 4:
                other = draws.choice(SEEDS)
                data[at:] = other[draws.randrange(len(other)) :]
            case _:  # a length that promises more than there is
                data[at:at] = bytes([draws.choice((0xC6, 0xDB, 0xDD, 0xDF, 0xC9))]) + b"\xff\xff\xff\xff"
    return bytes(data)


def test_a_million_inputs_do_the_decoder_no_harm() -> None:
    draws = random.Random(20261123)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    messages, slowest = 0, 0.0
    for _ in range(INPUTS):
        data = mutated(draws)
        began = time.perf_counter()
        for kinds in (draws.choice(KINDS),):
            try:
                message: object = decode(data, kinds)
            except ProtocolError:
                continue
            messages += 1
            assert type(message) in kinds.values()
        slowest = max(slowest, time.perf_counter() - began)
    assert messages > INPUTS // 1000, "the mutations are too wild: hardly any is a message"
    assert slowest < 5.0  # a hang, not a timing
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY
    print(f"{INPUTS} inputs, {messages} of them messages")  # noqa: T201  # a figure for who runs it with -s


FLOOD = """
import random, sys, time
import zmq
from drp.protocol.transport import MAX_FROM_WORKER
from tests.faults.test_wire import mutated

draws, context, sent = random.Random(1), zmq.Context(), 0
context.linger = 0
garbage = [mutated(draws) for _ in range(500)] + [b"", b"\\xc1", b"x" * (MAX_FROM_WORKER + 1)]
print("flooding", flush=True)
while True:
    for endpoint in sys.argv[1:]:
        stranger = context.socket(zmq.DEALER)
        stranger.connect(endpoint)
        for data in draws.sample(garbage, 5):
            stranger.send_multipart([data] if draws.random() < 0.9 else [data, data, b""], zmq.NOBLOCK)
        time.sleep(0.002)
        stranger.close()
"""


def test_a_flood_from_strangers_changes_nothing(tmp_path: Path) -> None:
    """The same user, or root, may connect to a worker's socket: neither the run nor the worker notices."""
    options = {"shape": (64,), "steps": 200, "mode": "aggressive"}
    expected = drp.reference("tests.denoisers:make_slow", devices=2, **options).samples  # type: ignore[arg-type]
    with Leader("tests.denoisers:make_slow", devices=2) as leader:
        local, before = leader.internals.pool.local, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        endpoints = [local.socket.endpoint(worker.identity) for worker in local.workers.values()]
        flood = python(["-c", FLOOD, *endpoints], tmp_path)
        assert flood.stdout is not None
        assert flood.stdout.readline() == "flooding\n"
        try:
            result = leader.submit(**options).result(100.0)  # type: ignore[arg-type]  # as above
            assert flood.poll() is None
        finally:
            flood.kill()
            flood.communicate(timeout=10)
        assert torch.equal(result.samples, expected)
        assert result.incidents == ()
        assert [worker.losses for worker in leader.workers] == [0, 0]
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


def test_a_message_that_is_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match=f"at most {MAX_MESSAGE}"):
        decode(b"\x00" * (MAX_MESSAGE + 1), TO_LEADER)
