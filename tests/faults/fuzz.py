"""Coverage-guided fuzzing of the decoder, for as long as one likes: `make fuzz`, which runs it for five minutes.

Whatever comes is a message or a ProtocolError; a message is the same after another round of encoding and decoding.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["drp.protocol"]):
    from drp.errors import ProtocolError
    from drp.protocol import client_messages
    from drp.protocol.codec import decode, encode
    from drp.protocol.messages import TO_LEADER, TO_WORKER
    from tests.vectors.examples import PROTOCOLS, examples

KINDS = (TO_LEADER, TO_WORKER, client_messages.TO_CLIENT, client_messages.TO_SERVER)


def one_input(data: bytes) -> None:
    """Decode as each of the four kinds."""
    for kinds in KINDS:
        try:
            message: object = decode(data, kinds)
        except ProtocolError:
            continue
        assert decode(encode(message), kinds) == message


CORPUS = Path("build/corpus")
"""Where inputs are kept that reached something new."""


if __name__ == "__main__":
    CORPUS.mkdir(parents=True, exist_ok=True)
    for protocol in PROTOCOLS:  # Bytes at random are hardly ever MessagePack: begin with messages.
        for name, message in examples(protocol).items():
            (CORPUS / name.replace("/", "-")).write_bytes(encode(message))
    atheris.Setup([*sys.argv, str(CORPUS)], one_input)
    atheris.Fuzz()
