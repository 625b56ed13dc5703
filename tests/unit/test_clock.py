"""The time by which the leader judges its workers: what it slept through itself is nobody's delay."""

from __future__ import annotations

import time

import pytest

from drp.leader.clock import STALL, Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock over a time that tests set."""
    monkeypatch.setattr("drp.leader.clock.time.monotonic", lambda: NOW[0])
    NOW[0] = 1000.0
    return Clock()


NOW = [0.0]


def test_a_wait_as_long_as_planned_counts(clock: Clock) -> None:
    NOW[0] += 5.0
    clock.resume(planned=1005.0)
    assert clock.now() == 1005.0
    NOW[0] += 3.0
    clock.resume(planned=1015.0)  # something came before
    assert clock.now() == 1008.0


def test_work_between_two_waits_counts_unless_it_is_long(clock: Clock) -> None:
    NOW[0] += STALL / 2
    clock.resume()
    assert clock.now() == 1000.0 + STALL / 2
    NOW[0] += 6.5
    clock.resume()
    assert clock.now() == 1000.0 + STALL / 2


def test_a_wait_that_lasted_longer_than_planned_is_left_out_whole(clock: Clock) -> None:
    """The thread was stopped, nobody knows since when; workers may have been stopped with it."""
    NOW[0] += 15.0
    clock.resume(planned=1001.0)
    assert clock.now() == 1000.0
    assert clock.to_monotonic(1002.0) == 1017.0
    NOW[0] += 1.0
    clock.resume(planned=1016.0)
    assert clock.now() == 1001.0


def test_it_goes_on_meanwhile() -> None:
    clock = Clock()
    before = clock.now()
    time.sleep(0.01)
    assert clock.now() >= before + 0.01
