"""The queue of new work, after the engine has ended."""

from __future__ import annotations

from typing import Any

from drp.leader.request_queue import RequestQueue


def test_the_queue_of_an_engine_that_has_ended_keeps_no_session() -> None:
    """A session keeps its memory mapped, and the program may keep the closed leader."""
    queue = RequestQueue()
    session: Any = object()
    queue.notify(session)
    assert list(queue.notified) == [session]
    queue.close_descriptor()
    assert not queue.notified
    queue.notify(session)  # For example because it is closed after its leader.
    assert not queue.notified
