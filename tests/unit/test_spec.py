"""The written protocol: SPEC.md, the golden vectors and the classes say the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgpack
import pytest

from drp.client.options import REPORTING, SubmitArguments
from drp.errors import ProtocolError
from drp.leader.request import RequestArguments
from drp.protocol import client_messages, messages
from drp.protocol.codec import decode, encode, to_fields
from tests.vectors import __main__ as vectors
from tests.vectors.examples import PROTOCOLS
from tests.vectors.tables import meanings

RENEW = "run python -m tests.vectors, and see section 5 of SPEC.md"
KINDS = {name: {**one, **other} for name, (one, other) in PROTOCOLS.items()}


def lines(name: str) -> dict[str, bytes]:
    pairs = (line.split(" ") for line in (vectors.HERE / f"{name}.hex").read_text().splitlines())
    return {name: bytes.fromhex(data.replace("-", "")) for name, data in pairs}


def facts(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((vectors.HERE / f"{name}.json").read_text())
    return loaded


def typed(value: object) -> str:
    """Tell 1 from 1.0, and maps of another order not; bytes are written in hex."""
    return json.dumps(value, sort_keys=True, default=bytes.hex)


@pytest.mark.parametrize("path", vectors.rendered(), ids=lambda path: path.name)
def test_files_are_what_the_classes_say(path: Path) -> None:
    assert path.read_text() == vectors.rendered()[path], f"{path.name} differs; {RENEW}"


def test_every_class_has_a_table_and_every_field_a_meaning() -> None:
    tables = meanings(vectors.SPEC.read_text())
    assert tables.keys() == vectors.spec_records().keys()
    for name, kind in vectors.spec_records().items():
        assert list(tables[name]) == [field.name for field in dataclasses.fields(kind)]
        assert all(tables[name].values()), f"{name} has a field without a meaning in SPEC.md"


def test_the_specification_names_the_versions_and_the_limits() -> None:
    text = vectors.SPEC.read_text()
    assert f"the client protocol, version {client_messages.VERSION} " in text
    assert f"the worker protocol, version {messages.VERSION} " in text
    assert "at most 1,048,576 bytes" in text
    assert f"at most {client_messages.MAX_FRAMES} and of at most 2^28 bytes" in text
    assert client_messages.MAX_FRAME_NBYTES == 2**28
    assert "every second" in text
    assert client_messages.HEARTBEAT_INTERVAL == 1.0
    assert f"After {client_messages.SILENCE_TIMEOUT:g} s of silence" in text
    assert f"unacknowledged for {client_messages.ACK_TIMEOUT:g} s" in text


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_vectors_read_by_msgpack_alone(protocol: str) -> None:
    expected = facts(protocol)
    for name, data in lines(protocol).items():
        assert typed(msgpack.unpackb(data)) == typed(expected[name]), name
    assert expected.keys() == lines(protocol).keys()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_vectors_read_by_the_codec(protocol: str) -> None:
    for name, data in lines(protocol).items():
        message: Any = decode(data, KINDS[protocol])
        assert encode(message) == data, name
        assert type(message).__name__ == name.split("/")[0]
    assert {name.split("/")[0] for name in lines(protocol)} == KINDS[protocol].keys()


def test_what_must_be_refused_is() -> None:
    reasons = facts("refused")
    for name, data in lines("refused").items():
        protocol = name.split("/")[0]
        for each in KINDS if protocol == "any" else (protocol,):
            with pytest.raises(ProtocolError):
                decode(data, KINDS[each])
            assert reasons[name]


def test_fields_come_in_any_order_and_numbers_in_any_width() -> None:
    message = client_messages.Cancel(300)
    assert (
        decode(b"\x82\xa7request\xd3" + (300).to_bytes(8, "big") + b"\xa4type\xa6Cancel", client_messages.TO_SERVER)
        == message
    )


def test_all_options_of_a_run_can_be_submitted() -> None:
    reporting = {"request", "progress", "previews", "timeline", "memory"}
    missing = (
        RequestArguments.__annotations__.keys()
        - {"callback", "out"}
        - client_messages.Submit.__dataclass_fields__.keys()
    )
    assert not missing, f"Submit lacks {missing}: add them there, in drp/client and drp/server/options.py"
    assert {"callback", "out"} | SubmitArguments.__annotations__.keys() == RequestArguments.__annotations__.keys()
    assert {"request", *REPORTING} == reporting
    assert client_messages.Submit.__dataclass_fields__.keys() - reporting <= RequestArguments.__annotations__.keys()


def test_defaults_are_those_of_a_request() -> None:
    from drp.leader.request import Request

    theirs, ours = to_fields(Request()), to_fields(client_messages.Submit(request=0))
    for name in theirs.keys() & ours.keys() - {"cond", "grid", "solver_options"}:
        assert ours[name] == theirs[name], name
