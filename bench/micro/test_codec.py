"""How long does a message take to encode, and to decode with every check? The goal is under 20 us."""

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from drp.protocol.codec import decode, encode
from drp.protocol.handles import Handle
from drp.protocol.messages import TO_LEADER, TO_WORKER, Bind, Draft, Prediction, TensorSpec, ToLeader, ToWorker

X = TensorSpec("x", "float32", (1, 4, 64, 64), 0)
MESSAGES = [
    Draft(1, 47, 999.0, 23, 31),
    Prediction(1, 47, 31, 0.02),
    Bind(1, Handle(1234, 5, 1 << 20), 24, 40, (X,), (X,), (TensorSpec("labels", "int64", (1,), 0),)),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_encode(benchmark: BenchmarkFixture, message: ToWorker | ToLeader) -> None:
    """Encode a message."""
    assert len(benchmark(encode, message)) > 0


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_decode(benchmark: BenchmarkFixture, message: ToWorker | ToLeader) -> None:
    """Decode a message."""
    assert benchmark(decode, encode(message), TO_WORKER | TO_LEADER) == message
