"""Timeline: when what happened in the rounds, for benches and traces."""

from __future__ import annotations

from typing import Literal, NamedTuple

What = Literal["begin", "formed", "sent", "hedged", "refined", "answer", "lost", "end"]


class Mark(NamedTuple):
    """Something happened at `ns` of time.perf_counter_ns, in the leader.

    begin: the run's clock starts. formed: a round's drafts are written. sent: the draft of `step` went to `worker`.
    hedged: the draft of `step` is late at `worker`, and is sent to another too.
    refined: the states behind are done, callbacks called. answer: the prediction of `step` came from `worker`, whose
    own clock says `seconds`. lost: `worker` is gone, and
    with it what it had been given; `step` is to be evaluated by another. end: the run's clock stops.
    """

    what: What
    ns: int
    run: int
    step: int = 0
    worker: int = 0
    seconds: float = 0.0


Timeline = list[Mark]
