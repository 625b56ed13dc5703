"""Reading a leader's socket, for tests and micro benches."""

import time

from drp.protocol.codec import decode
from drp.protocol.messages import TO_LEADER, ToLeader
from drp.protocol.transport import LeaderSocket


def receive_one(leader: LeaderSocket, seconds: float) -> tuple[bytes, ToLeader]:
    """Wait for one message, some seconds at most; return its sender and the message."""
    deadline = time.monotonic() + seconds
    while not (received := leader.receive()):
        assert time.monotonic() < deadline
        leader.sleep(deadline - time.monotonic())
    ((identity, frame),) = received
    return identity.bytes, decode(frame.bytes, TO_LEADER)
