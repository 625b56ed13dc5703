"""Workers that misbehave on order, which the tests of a file share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.async_runs import Misbehaving, misbehaving_workers


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Misbehaving]:
    with misbehaving_workers(tmp_path_factory.mktemp("orders")) as started:
        yield started


@pytest.fixture
def misbehaving(started: Misbehaving) -> Iterator[Misbehaving]:
    yield started
    started.behave()
