"""Inline tensors: what one side copies into frames, the other has in its own arena, and anything else is refused."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import zmq
from hypothesis import given
from hypothesis import strategies as st

from drp.errors import ProtocolError
from drp.protocol import inline
from drp.protocol.arena import Arena
from drp.protocol.codec import decode, encode
from drp.protocol.handles import Handle
from drp.protocol.inline import LeaderFrames, WorkerFrames
from drp.protocol.messages import (
    TO_LEADER,
    TO_WORKER,
    BatchedDraft,
    Bind,
    Draft,
    EvaluationError,
    Prediction,
    Rebind,
    Stop,
    Unbind,
)
from drp.protocol.transport import receive_frames, send_frames

COND = {"labels": torch.tensor([3, 1]), "shift": torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)}


@pytest.fixture
def arena() -> Iterator[Arena]:
    inputs, outputs = {"x": torch.zeros(2, 5), "mask": torch.zeros(3, dtype=torch.bool)}, {"y": torch.zeros(7)}
    made = Arena.lay_out(4, inputs, outputs, 3, 5, COND)
    for slot in range(3):
        made.draft(slot)["x"].copy_(torch.randn(2, 5))
        made.draft(slot)["mask"].copy_(torch.tensor([True, False, slot == 1]))
    yield made
    made.close()


@contextlib.contextmanager
def bound(arena: Arena) -> Iterator[tuple[LeaderFrames, WorkerFrames, Arena]]:
    """Return both sides after a Bind, and the arena that a worker opens by what it is told."""
    leader, worker = LeaderFrames(Arena.open), WorkerFrames()
    try:
        told = worker.decode(leader.encode(arena.bind))
        assert isinstance(told, Bind)
        yield leader, worker, Arena.open(told)
    finally:
        worker.close()


def test_tensors_arrive_and_nothing_names_the_leaders_memory(arena: Arena) -> None:
    with bound(arena) as (leader, worker, theirs):
        assert decode(bytes(leader.encode(arena.bind)[0]), TO_WORKER) == replace(arena.bind, memory=None, number=0)
        assert all(torch.equal(theirs.cond[name], COND[name]) for name in COND)
        draft = Draft(4, 10, 0.5, 1, 4, batched=(BatchedDraft(11, 0.4, 2, 0),))
        assert worker.decode(leader.encode(draft)) == draft
        for slot in (1, 2):
            assert all(torch.equal(value, theirs.draft(slot)[name]) for name, value in arena.draft(slot).items())
        theirs.prediction(4)["y"].fill_(1.5)
        theirs.prediction(0)["y"].fill_(2.5)
        answer = Prediction(4, 10, 4, 0.1)
        assert leader.decode(worker.encode(answer)) == answer
        assert arena.predictions[:, 0].tolist() == [2.5, 0, 0, 0, 1.5]
        with pytest.raises(ProtocolError, match="answers no draft"):
            leader.decode([encode(answer), b"", b""])


def test_drafts_that_change_after_they_were_sent_arrive_as_they_were(arena: Arena) -> None:
    with bound(arena) as (leader, worker, theirs), zmq.Context() as context:
        sender, receiver = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        with sender, receiver:
            receiver.bind("inproc://drafts")
            sender.connect("inproc://drafts")
            expected = arena.drafts[0].clone()
            send_frames(sender, leader.encode(Draft(4, 10, 0.5, 0, 0)))
            arena.drafts[0].fill_(9.0)
            worker.decode([frame.buffer for frame in receive_frames(receiver)])
            assert torch.equal(theirs.drafts[0], expected)


def test_sending_a_large_draft_takes_no_further_thread() -> None:
    with zmq.Context() as context:
        sender, receiver = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        with sender, receiver:
            receiver.bind("inproc://large")
            sender.connect("inproc://large")
            threads = threading.active_count()
            send_frames(sender, [b"draft", bytes(1 << 20)])
            assert threading.active_count() == threads
            assert len(receive_frames(receiver)[1]) == 1 << 20


def test_runs_that_follow_one_another_use_the_same_memory(arena: Arena) -> None:
    with bound(arena) as (leader, worker, _):
        worker.decode(leader.encode(Unbind(4)))
        told = [worker.decode(leader.encode(replace(arena.bind, run=run))) for run in (5, 6)]
        worker.decode(leader.encode(Unbind(5)))
        told.append(worker.decode(leader.encode(replace(arena.bind, run=7))))
        numbers = [bind.number for bind in told if isinstance(bind, Bind)]
        assert numbers[0] == numbers[2] != numbers[1]


def test_memory_that_is_kept_for_the_next_run_is_bound_anew_with_its_conditions(arena: Arena) -> None:
    with bound(arena) as (leader, worker, _):
        assert worker.decode(leader.encode(Unbind(4, keep=True))) == Unbind(4)
        arena.cond["labels"].fill_(7)
        told = worker.decode(leader.encode(Rebind(5)))
        assert isinstance(told, Bind)
        assert told.run == 5
        assert Arena.open(told).cond["labels"].tolist() == [7, 7]


@given(st.data())
def test_frames_of_another_number_or_length_are_refused(data: st.DataObject) -> None:
    arena = Arena.create(4, torch.zeros(2, 5), 2, 2, COND)
    try:
        with bound(arena) as (leader, worker, _):
            draft = Draft(4, 10, 0.5, 1, 1)
            good = leader.encode(draft)
            frames = data.draw(
                st.lists(st.binary(max_size=300), max_size=3).filter(lambda f: [len(x) for x in f] != [256])
            )
            for side, head in (
                (worker, good[0]),
                (worker, encode(arena.bind)),
                (leader, encode(Prediction(4, 10, 1, 0.1))),
            ):
                with pytest.raises(ProtocolError):
                    side.decode([head, *frames])
    finally:
        arena.close()


def test_what_a_worker_must_not_be_told_is_refused(arena: Arena) -> None:
    with bound(arena) as (leader, worker, _):
        with pytest.raises(ProtocolError, match="1 frames after a Stop"):
            worker.decode([encode(Stop()), b""])
        with pytest.raises(ProtocolError, match="a Bind names memory of another machine"):
            worker.decode([encode(replace(arena.bind, memory=Handle(1, 3, 4096))), b""])
        with pytest.raises(ProtocolError, match="a draft in slot 3 of run 4, which is not bound so"):
            worker.decode([encode(Draft(4, 10, 0.5, 3, 0)), b""])
        with pytest.raises(ProtocolError, match="no message"):
            worker.decode([])
        leader.encode(Draft(4, 10, 0.5, 0, 0))
        with pytest.raises(ProtocolError, match="1 frames after a EvaluationError"):
            leader.decode([encode(EvaluationError(4, 10, 0, "", "")), b""])


def test_tensors_too_long_for_a_frame_are_refused(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inline, "MAX_FRAME_NBYTES", 511)
    with pytest.raises(ValueError, match="are 512 bytes long; at most 511 are sent to a worker on another machine"):
        LeaderFrames(Arena.open).encode(arena.bind)


def test_an_answer_is_a_message_of_its_kind() -> None:
    with pytest.raises(ProtocolError):
        LeaderFrames(Arena.open).decode([encode(Stop())])
    assert "Pong" in TO_LEADER
