"""The plan of a run on demand, with coefficients in the dtype and on the device of its state, shared between runs."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from drp.sampling.modes import Mode
from drp.sampling.partial_sums import Rows, draft_order, state_order
from drp.sampling.plan import Advance, Measure, Predict, make_plan, max_advance
from drp.sampling.solvers import Solver


class PlannedRound:
    """A round whose coefficients have the state's dtype and device."""

    def __init__(self, event: Predict, like: Tensor) -> None:
        self.indices, self.unawaited_rounds = event.indices, event.unawaited_rounds
        self.drafts = Rows(event.drafts, like, draft_order)


class PlannedAdvance:
    """An advance by `steps` steps, whose coefficients have the state's dtype and device.

    The last `eager` states, which a step from the new base uses, are computed before the next round's drafts.
    """

    def __init__(self, event: Advance, like: Tensor) -> None:
        self.base, self.oldest, self.previous_base = event.base, event.oldest, event.previous_base
        self.unawaited_rounds = event.unawaited_rounds
        self.steps = len(event.states)
        self.eager = min(self.steps, event.base + self.steps - event.oldest + 1)
        split = self.steps - self.eager
        self.between = Rows(event.states[:split], like, state_order)
        self.last = Rows(event.states[split:], like, state_order)


def _to_planned(event: Predict | Advance, like: Tensor) -> PlannedRound | PlannedAdvance:
    return PlannedRound(event, like) if isinstance(event, Predict) else PlannedAdvance(event, like)


class KnownEvents:
    """The events of a plan that any run has computed so far. They do not refer to the solver."""

    def __init__(self) -> None:
        self.events: list[PlannedRound | PlannedAdvance] = []
        self.complete = False
        self.longest = 0
        """The steps of the longest advance; 0 until it is known."""
        self.lock = threading.Lock()


class CachedPlan:
    """The events of a run in order, computed on demand. Thread-safe.

    `events` generates all events of the run; those that other runs have computed are in `known` and are skipped.
    """

    def __init__(self, events: Iterator[Predict | Advance], like: Tensor, longest: int, known: KnownEvents) -> None:
        self.longest = longest
        self._events, self._passed, self._like, self._known = events, 0, like, known

    def get(self, position: int) -> PlannedRound | PlannedAdvance | None:
        """Return the event at a position, None past the end."""
        known = self._known
        if position >= len(known.events) and not known.complete:
            with known.lock:
                # Another thread may have computed the event in the meantime.
                there = len(known.events)
                if position >= there and not known.complete:
                    new = itertools.islice(self._events, there - self._passed, position + 1 - self._passed)
                    known.events += (_to_planned(event, self._like) for event in new)
                    self._passed = len(known.events)
                    known.complete = self._passed <= position
        return known.events[position] if position < len(known.events) else None


_known_events: WeakKeyDictionary[Solver, dict[tuple[Mode, torch.dtype, torch.device, int], KnownEvents]] = (
    WeakKeyDictionary()
)
"""Cache of events, which are the same for all runs with the same solver and mode without feedback.

Only computed events are cached: an unfinished generator would refer to the solver and keep it alive forever.
"""


def make_cached_plan(solver: Solver, mode: Mode, like: Tensor, measure: Measure) -> CachedPlan:
    """Return the plan of a run whose state is like `like`; `measure` returns the residuals of a mode with feedback."""
    if mode.feedback:
        return CachedPlan(make_plan(solver, mode, measure), like, mode.width + 1, KnownEvents())
    like = like.new_empty(0)  # The cached events outlive the run and must not keep its state alive.
    known = KnownEvents()
    with contextlib.suppress(TypeError):  # A user's mode may not be hashable.
        stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0  # copies the weights
        known = _known_events.setdefault(solver, {}).setdefault((mode, like.dtype, like.device, stream), known)
    known.longest = known.longest or max_advance(mode, solver.grid.steps)
    return CachedPlan(make_plan(solver, mode), like, known.longest, known)
