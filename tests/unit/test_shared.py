"""The leaders that tests share: what one test does to a leader is undone for the next."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest


class Fake:
    """What is looked at of a leader."""

    def __init__(self) -> None:
        self.policy, self.timeline, self.closed = "usual", None, False
        self.workers = [SimpleNamespace(pid=1, state="ready")]
        self.internals = SimpleNamespace(runs=SimpleNamespace(running=[], draining=[]))

    @property
    def _leader(self) -> Fake:
        return self

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(conftest.SHARED, "fake", Fake)
    yield lambda: conftest.share("fake")
    conftest.shared.pop("fake", None)


def test_the_next_test_has_the_same_leader_with_its_own_settings(used: Any) -> None:
    first = used()
    leader = next(first)
    leader.policy, leader.timeline = "another", []
    assert next(first, None) is None
    assert next(used()) is leader
    assert (leader.policy, leader.timeline) == ("usual", None)


@pytest.mark.parametrize("broken", [{"closed": True}, {"workers": [SimpleNamespace(pid=None, state="lost")]}])
def test_a_leader_that_a_test_has_broken_fails_it_and_is_replaced(
    used: Any, broken: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conftest, "DEADLINE", 0.01)
    first = used()
    leader = next(first)
    vars(leader).update(broken)
    with pytest.raises(pytest.fail.Exception, match="the test left the shared leader 'fake' without a worker"):
        next(first)
    assert leader.closed
    assert next(used()) is not leader
