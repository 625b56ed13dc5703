"""Hostile bytes: a million for the decoder, and a flood for a leader that is at work."""

from __future__ import annotations

import contextlib
import random
import resource
import time

import pytest
import torch
import zmq

import drp
from drp import Leader
from drp.protocol import door
from drp.protocol.codec import MAX_MESSAGE, ProtocolError, decode, encode
from drp.protocol.messages import TO_LEADER, TO_WORKER, Prediction
from drp.protocol.transport import MAX_FROM_WORKER
from drp.protocol.vectors.examples import PROTOCOLS, examples

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

INPUTS = 1_000_000
KINDS = (TO_LEADER, TO_WORKER, door.TO_CLIENT, door.TO_SERVER)
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


def test_a_flood_from_strangers_changes_nothing() -> None:
    """Whoever gets to the socket (the same user, or root) can neither stop a run nor make the leader grow."""
    options = {"shape": (64,), "steps": 200, "mode": "aggressive"}
    expected = drp.reference("tests.denoisers:make_slow", devices=2, **options).samples  # type: ignore[arg-type]
    draws = random.Random(1)
    garbage = [mutated(draws) for _ in range(500)] + [encode(Prediction(0, 1, 0, 0.0)), b"", b"\xc1"]
    context = zmq.Context()
    with Leader("tests.denoisers:make_slow", devices=2) as leader:
        strangers = []
        for name in (b"worker-0-0", b"worker-1-7", b"stranger", b"", b""):
            stranger = context.socket(zmq.DEALER)
            stranger.setsockopt(zmq.LINGER, 0)
            if name:
                stranger.setsockopt(zmq.IDENTITY, name)
            stranger.connect(leader._engine._pool._socket.endpoint)
            strangers.append(stranger)
        pending = leader.submit(**options)  # type: ignore[arg-type]  # as above
        sent, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        deadline = time.monotonic() + 100
        while not pending.done() and time.monotonic() < deadline:
            if sent % 100 == 0:  # longer than any message: the connection ends, and nobody reads it
                with contextlib.suppress(zmq.Again):
                    strangers[-1].send(b"x" * (MAX_FROM_WORKER + 1), zmq.NOBLOCK)
            for stranger in strangers:
                for data in draws.sample(garbage, 5):
                    frames = [data] if draws.random() < 0.9 else [data, data, b""]
                    try:
                        stranger.send_multipart(frames, zmq.NOBLOCK)
                        sent += 1
                    except zmq.Again:
                        break
            time.sleep(0.002)
        result = pending.result(1.0)
        assert torch.equal(result.samples, expected)
        assert result.incidents == ()
        assert leader.dropped > 1000, f"{leader.dropped} of {sent} were seen"
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY
    context.destroy(linger=0)


def test_a_message_that_is_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(ProtocolError, match=f"at most {MAX_MESSAGE}"):
        decode(b"\x00" * (MAX_MESSAGE + 1), TO_LEADER)
