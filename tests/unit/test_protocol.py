"""Messages, their bytes, and shared memory."""

import contextlib
import dataclasses
import functools
import math
import os
import resource
import subprocess
import sys
import tempfile
import types
import typing
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
import torch
import zmq
from hypothesis import given
from hypothesis import strategies as st

from drp.errors import ProtocolError
from drp.protocol import client_messages, codec, messages
from drp.protocol.arena import Arena
from drp.protocol.codec import decode, encode
from drp.protocol.handles import Handle
from drp.protocol.memory import SharedMemory, available_nbytes
from drp.protocol.messages import (
    TO_LEADER,
    TO_WORKER,
    Bind,
    Draft,
    Load,
    Prediction,
    Stop,
    TensorSpec,
    Unbind,
)
from drp.protocol.transport import LeaderSocket, WorkerSocket
from tests.leader_socket import receive_one

KINDS: dict[str, type] = {**TO_WORKER, **TO_LEADER, **client_messages.TO_SERVER, **client_messages.TO_CLIENT}


def values(hint: typing.Any) -> st.SearchStrategy[typing.Any]:
    """Everything that an annotation of the codec allows."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return records(typing.cast(type, hint))
    if origin is typing.Annotated:
        inner, limit = arguments
        if inner is int:
            return st.integers(int(limit.low), int(limit.high))
        if inner is float:
            return st.floats(limit.low, limit.high, allow_nan=False)
        if inner is str:
            return st.text(max_size=min(limit.max, 50))
        if inner is bytes:
            return st.binary(max_size=min(limit.max, 8))
        return st.lists(values(typing.get_args(inner)[0]), max_size=min(limit.max, 4)).map(tuple)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*(values(a) for a in arguments))
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if hint is type(None):
        return st.none()
    assert hint is bool
    return st.booleans()


@functools.cache
def records(kind: type) -> st.SearchStrategy[typing.Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return st.builds(kind, **{name: values(hint) for name, hint in hints.items()})


@given(st.sampled_from(sorted(KINDS)).flatmap(lambda name: records(KINDS[name])))
def test_every_message_survives_the_wire(message: object) -> None:
    assert decode(encode(message), KINDS) == message


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data, KINDS)


@given(st.data())
def test_a_damaged_message_is_refused_or_another_message(data: st.DataObject) -> None:
    good = bytearray(encode(Draft(1, 2, 3.0, 4, 5)))
    place = data.draw(st.integers(0, len(good) - 1))
    good[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        assert isinstance(decode(bytes(good), KINDS), tuple(KINDS.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": -1}, "Draft.run: -1 is not 0 to"),
        ({"run": 2**31}, "Draft.run"),
        ({"run": True}, "Draft.run: True"),
        ({"run": 1.0}, "Draft.run"),
        ({"run": None}, "Draft.run"),
        ({"timestep": math.nan}, "Draft.timestep"),
        ({"timestep": math.inf}, "Draft.timestep"),
        ({"timestep": "1"}, "Draft.timestep"),
        ({"extra": 1}, "has the fields"),
        ({"type": "Drift"}, "unknown message type 'Drift'"),
        ({"type": ["Draft"]}, "unknown message type"),
    ],
)
def test_a_field_out_of_bounds_is_named(change: dict[str, object], message: str) -> None:
    fields = {"type": "Draft", "run": 1, "index": 2, "timestep": 3.0, "slot": 4, "row": 5, "sequence": 0, "after": 0}
    fields |= {"batched": []}
    with pytest.raises(ProtocolError, match=message):
        decode(msgpack.packb(fields | change), KINDS)


def test_a_bad_message_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match=r"Draft\.slot"):
        encode(Draft(0, 0, 0.0, -1, 0))
    with pytest.raises(ProtocolError, match=r"Load\.model"):
        encode(Load("m" * 201))


@pytest.mark.parametrize("data", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb({1: 2}), msgpack.packb(None)])
def test_what_is_no_map_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data, KINDS)


def test_extension_types_and_long_messages_are_refused() -> None:
    with pytest.raises(ProtocolError):
        decode(msgpack.packb({"type": msgpack.ExtType(5, b"x" * 8)}), KINDS)
    with pytest.raises(ProtocolError, match="at most"):
        decode(b"\xa1" * (codec.MAX_MESSAGE + 1), KINDS)


def test_a_peer_cannot_shrink_memory_under_a_reader() -> None:
    memory = SharedMemory.create(4096)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.handle.fd, 0)
    memory.close()


def test_the_memory_that_a_machine_has_left_is_known() -> None:
    with Path("/proc/meminfo").open() as meminfo:
        total = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in meminfo}
    assert 0 < available_nbytes() <= total["MemTotal"] + total["SwapTotal"]


@pytest.mark.parametrize(
    ("offset", "shape"), [(0, (1025,)), (4096, (1,)), (128, (1,)), (-256, (1,)), (256, (2**40,)), (0, (2**31, 2**31))]
)
def test_a_tensor_outside_of_its_memory_is_refused(offset: int, shape: tuple[int, ...]) -> None:
    memory = SharedMemory.create(4096)
    with pytest.raises(ProtocolError, match="not within"):
        memory.tensor(offset, shape, torch.float32)
    memory.close()


def test_a_handle_that_lies_is_refused() -> None:
    memory = SharedMemory.create(4096)
    own = memory.handle
    for handle in (Handle(own.pid, own.fd, 8192), Handle(own.pid, own.fd, 0), Handle(own.pid, 2**20, 4096)):
        with pytest.raises(ProtocolError):
            SharedMemory.open(handle)
    memory.close()


def test_an_arena_is_the_same_on_both_sides() -> None:
    noise = torch.zeros(3, 1, 5)
    cond = {"labels": torch.tensor([1, 2, 3]), "guidance": torch.tensor(2.0), "mask": torch.ones(2, 2).bool()}
    mine = Arena.create(7, noise, slots=4, rows=4, cond=cond)
    peer = Arena.open(typing.cast(Bind, decode(encode(mine.bind), TO_WORKER)))
    mine.drafts[2] = torch.arange(15.0)
    peer.predictions[3] = 1.5
    assert torch.equal(peer.drafts[2], torch.arange(15.0))
    assert torch.equal(mine.predictions[3], torch.full((15,), 1.5))
    assert all(torch.equal(peer.cond[name], cond[name]) for name in cond)
    assert peer.drafts[1].data_ptr() % 256 == 0
    mine.close()


def test_a_slot_holds_several_tensors_and_predictions_of_another_shape() -> None:
    inputs = {"latents": torch.zeros(1, 9, 4, 4), "t": torch.tensor(3), "mask": torch.zeros(0, 2).bool()}
    outputs = {"noise": torch.zeros(1, 4, 4, 4).bfloat16(), "extra": torch.zeros(3, dtype=torch.complex64)}
    mine = Arena.lay_out(7, inputs, outputs, 3, 3, {"embedding": torch.ones(2, 5)})
    peer = Arena.open(typing.cast(Bind, decode(encode(mine.bind), TO_WORKER)))
    for slot in range(3):
        mine.draft(slot)["latents"].fill_(slot + 1)
        mine.draft(slot)["t"].fill_(slot + 10)
        peer.prediction(slot)["noise"].fill_(-slot)
        peer.prediction(slot)["extra"].fill_(slot * 1j)
    for slot in range(3):
        draft, prediction = peer.draft(slot), mine.prediction(slot)
        assert {name: (t.shape, t.dtype) for name, t in draft.items()} == {
            name: (t.shape, t.dtype) for name, t in inputs.items()
        }
        assert (draft["latents"] == slot + 1).all()
        assert draft["t"] == slot + 10
        assert (prediction["noise"] == -slot).all()
        assert prediction["noise"].shape == (1, 4, 4, 4)
        assert (prediction["extra"] == slot * 1j).all()
    assert (peer.cond["embedding"] == 1).all()
    mine.close()


def test_an_arena_that_does_not_fit_its_memory_is_refused() -> None:
    memory = SharedMemory.create(4096)
    x = (TensorSpec("x", "float32", (2, 2), 0),)
    for change in (
        {"slots": 10_000},
        {"rows": 10_000},
        {"slots": 0, "inputs": ()},
        {"inputs": (TensorSpec("x", "float32", (2**20, 2**20), 0),)},
        {"inputs": (TensorSpec("x", "object", (2, 2), 0),)},
        {"outputs": (TensorSpec("x", "float32", (2, 2), 4),)},
        {"outputs": (TensorSpec("x", "float32", (2, 2), 4096),)},
        {"cond": (TensorSpec("c", "float32", (65,), 3840),)},
        {"cond": (TensorSpec("c", "float7", (1,), 0),)},
    ):
        bind = dataclasses.replace(Bind(0, memory.handle, 2, 2, x, x, ()), **change)
        with pytest.raises(ProtocolError):
            Arena(memory, bind)
    memory.close()


def connected(leader: LeaderSocket, identity: bytes) -> WorkerSocket:
    """Return a worker's socket, in this process."""
    return WorkerSocket(leader.invite(identity).detach(), os.getpid())


DEADLINE = 5.0


def test_sockets_have_no_name_and_go_away() -> None:
    before = set(Path(tempfile.gettempdir()).iterdir())
    leader = LeaderSocket()
    worker = connected(leader, b"someone")
    assert set(Path(tempfile.gettempdir()).iterdir()) == before
    place = Path(leader.endpoint(b"someone").removeprefix("ipc://"))
    assert place.parent == Path(f"/proc/{os.getpid()}/fd")  # where the kernel lets nobody else in
    assert place.parent.stat().st_mode & 0o777 == 0o500
    worker.send(Prediction(1, 2, 3, 0.5))
    assert receive_one(leader, DEADLINE) == (b"someone", Prediction(1, 2, 3, 0.5))
    leader.send(b"someone", encode(Draft(1, 2, 3.0, 4, 5)))
    assert worker.receive(5.0) == Draft(1, 2, 3.0, 4, 5)
    together = (Draft(1, 3, 3.0, 4, 5), Unbind(1), Draft(2, 0, 1.0, 0, 0))
    leader.send(b"someone", *map(encode, together))
    assert [worker.receive(5.0 if place == 0 else 0.0) for place in range(3)] == list(together)
    assert worker.receive(0.01) is None
    worker.close()
    leader.close()
    assert not place.is_symlink()


def test_a_worker_that_was_dismissed_is_heard_no_more() -> None:
    leader = LeaderSocket()
    workers = [connected(leader, b"%d" % number) for number in range(2)]
    leader.dismiss(b"0")
    with pytest.raises(zmq.ZMQError, match="unreachable"):
        leader.send(b"0", encode(Stop()))
    workers[0].close()
    workers[1].send(Prediction(1, 2, 3, 0.5))
    assert receive_one(leader, DEADLINE) == (b"1", Prediction(1, 2, 3, 0.5))
    workers[1].close()
    leader.close()


def test_strangers_are_let_in_by_nobody() -> None:
    """Neither by the leader, which accepts no connection, nor by a worker, which accepts its leader's only."""
    leader = LeaderSocket()
    worker = connected(leader, b"someone")
    text = (
        "import sys, zmq; s = zmq.Context().socket(zmq.DEALER); s.linger = 0; s.connect(sys.argv[1]); "
        "s.send(b'stranger'); print(s.poll(300), s.getsockopt(zmq.EVENTS) & zmq.POLLIN)"
    )
    command = [sys.executable, "-c", text, leader.endpoint(b"someone")]
    assert subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout == "0 0\n"
    assert worker.receive(0.01) is None
    leader.send(b"someone", encode(Unbind(1)))
    assert worker.receive(5.0) == Unbind(1)
    worker.close()
    leader.close()


@pytest.mark.parametrize("folder", ["d" * 100, "Bücher 図書"])
def test_any_temporary_folder_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    (tmp_path / folder).mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / folder))
    leader = LeaderSocket()
    connected(leader, b"someone").close()
    leader.close()
    assert list((tmp_path / folder).iterdir()) == []


def test_without_descriptors_nothing_is_started_and_what_waits_for_one_is_tried_again() -> None:
    """libzmq would end the process: for a context that gets none, or a connection that it accepts."""
    leader = LeaderSocket()
    listener = leader.invite(b"someone")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with listener:
        last = os.dup(0)  # the lowest that is free
        os.close(last)
        resource.setrlimit(resource.RLIMIT_NOFILE, (last, before[1]))
        try:
            with pytest.raises(OSError, match=r"Too many open files: 16 descriptors are needed"):
                LeaderSocket()
            with pytest.raises(OSError, match="Too many open files"):
                leader.invite(b"another")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert list(Path(tempfile.gettempdir()).glob("drp-*")) == []
    assert leader.invite(b"another").detach() > 0
    leader.close()


def test_the_messages_are_all_named() -> None:
    for module, kinds in (
        (messages, {**TO_WORKER, **TO_LEADER}),
        (client_messages, {**client_messages.TO_SERVER, **client_messages.TO_CLIENT}),
    ):
        assert module.__doc__ is not None
        for name in kinds:
            assert f" {name} " in module.__doc__


@given(st.one_of(records(Draft), records(Prediction)), st.data())
def test_messages_of_numbers_go_the_quick_way_and_mean_the_same(message: object, data: st.DataObject) -> None:
    quick = encode(message)
    if len(quick) == codec._flat[type(message)].size:
        assert codec._flat[type(message)].unpack(quick) == message
    else:
        assert isinstance(message, Draft)
        assert message.batched
    slow = msgpack.packb({"type": type(message).__name__, **codec.to_fields(message)})
    assert msgpack.unpackb(quick) == msgpack.unpackb(slow)
    assert decode(quick, KINDS) == decode(slow, KINDS) == message
    place = data.draw(st.integers(0, len(quick) - 1))
    changed = bytearray(quick)
    changed[place] = data.draw(st.integers(0, 255))
    assert outcome(bytes(changed), codec.decode) == outcome(bytes(changed), slowly)


def outcome(data: bytes, read: Callable[[bytes, typing.Mapping[str, type]], object]) -> object:
    try:
        return repr(read(data, KINDS))
    except ProtocolError as error:
        return str(error)


def slowly(data: bytes, kinds: typing.Mapping[str, type]) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "_flat_by_size", {})
        return decode(data, kinds)
