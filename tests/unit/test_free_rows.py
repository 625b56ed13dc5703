"""Rows of predictions: whatever is late, there is one for each draft, and nobody writes where another reads."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from drp.leader.runs.session import EvaluationSession
from drp.protocol.arena import Arena

SLOTS = 5
AT_ONCE = 3
"""Drafts that workers have at most."""


class NoEngine:
    is_forked_copy = False

    def notify(self, session: EvaluationSession) -> None: ...


class Kept(EvaluationSession):
    """A session in which each slot's latest prediction is kept until the slot is used again, as in a run."""

    def __init__(self) -> None:
        one = {"x": torch.zeros(1)}
        super().__init__(1, Arena.lay_out(1, one, one, SLOTS, SLOTS + AT_ONCE, {}), NoEngine(), 1)
        self.latest: dict[int, int] = {}

    def rows_in_use(self) -> set[int]:
        return set(self.latest.values())


TWICE = [(0, []), *((slot, done) for slot in range(SLOTS) for done in ([], [1, 1]))]
"""Each slot's first draft is there only after its second was sent, and the very first never is."""


@example(TWICE)
@given(st.lists(st.tuples(st.integers(0, SLOTS - 1), st.lists(st.integers(0, AT_ONCE - 1), max_size=AT_ONCE))))
def test_there_is_a_row_for_each_draft(sent: list[tuple[int, list[int]]]) -> None:
    """A draft for a slot is sent, whose row then counts as the slot's; of those that were sent some are done."""
    session = Kept()
    try:
        writing: list[int] = []
        for slot, done in sent:
            session.latest.pop(slot, None)
            row = session.free_row(slot)
            assert row not in writing
            assert row not in session.latest.values()
            session.latest[slot] = row
            writing.append(row)
            for place in done if len(writing) < AT_ONCE else (*done, 0):
                if place < len(writing):
                    del writing[place]
            session.rows_in_flight = defaultdict(int, Counter(writing))
    finally:
        session.arena.close()
