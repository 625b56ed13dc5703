"""The arithmetic of one sampling run, without processes: schedules drafts, adds predictions and refines states."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from drp.sampling.linear import LinearCombination, Symbol, state
from drp.sampling.modes import Mode
from drp.sampling.plan import Advance, Measure, Predict, make_plan, max_advance, most_in_use
from drp.sampling.slot_allocator import SlotAllocator
from drp.sampling.solvers import Solver

Callback = Callable[[int, Tensor], None]
"""Called with the number of steps done, 1..N in order, and that state [B, ...]."""

Noise = Callable[[int], Tensor]
"""Called with a step's index; returns standard normal numbers shaped like the state, the same on every call."""

Add = Callable[[Tensor, Tensor, Tensor, bool], None]


class OperationQueue(Protocol):
    """Executes a run's arithmetic later, in the order in which it was enqueued."""

    def enqueue(self, do: Callable[[], object]) -> None:
        """Execute `do` after what was enqueued before."""
        ...

    def synchronize(self) -> None:
        """Wait until everything was executed."""
        ...


@dataclass(frozen=True)
class Task:
    """One evaluation: the draft in `slot`, at `timestep`."""

    index: int
    timestep: float
    slot: int


def batches(tasks: Sequence[Task], size: int) -> list[tuple[Task, ...]]:
    """Split a round's tasks, in order, into batches of up to `size`, each of which one device evaluates at once."""
    return [tuple(tasks[first : first + size]) for first in range(0, len(tasks), size)]


def slots(solver: Solver, mode: Mode, checkpoints: bool = False) -> int:
    """Return the number of slots that a run needs for drafts; it needs as many rows for predictions.

    With `checkpoints`, this includes the slots that two checkpoints within the last few rounds keep in use.
    """
    return _room(solver, mode, mode.width, checkpoints).rows


def _rounds_kept(solver: Solver, mode: Mode) -> int:
    """Return the maximum number of rounds that are in use at once.

    These are the round being evaluated, the round being refined and the round of its base; the round that the draft
    rule looks back on; and one round for each earlier index that the solver uses.
    """
    usual = 3 + mode.rule.looks_back + solver.history
    return max(usual, 1 + most_in_use(mode, solver.grid.steps, solver.history)) if mode.gaps else usual


def _room(solver: Solver, mode: Mode, width: int, checkpoints: bool) -> SlotAllocator:
    """Return an allocator for the slots in use at once; in a pipelined mode, rounds may have any length."""
    kept = _rounds_kept(solver, mode)
    more = ROUNDS_BACK if checkpoints else 0
    return SlotAllocator((2 * kept + more) * width, 1) if mode.pipelined else SlotAllocator(kept + more, width)


ROUNDS_BACK = 4
"""Rounds for which memory is reserved so that a run can return to a checkpoint."""


@dataclass(eq=False)
class Checkpoint:
    """The state of a run just after it has scheduled the drafts of a round, for `Run.restore`.

    Nothing is copied: while the run keeps the checkpoint, the rows that it refers to are not reused. `kept` is False
    once the checkpoint was dropped.
    """

    position: int
    slots: dict[int, int]
    answers: dict[int, int]
    rows: dict[int, int]
    ahead: tuple[int, list[float]]
    to_refine: tuple[tuple[_Advance, int], ...]
    out: tuple[_InFlightRound, ...]
    rounds_done: int
    steps_done: int
    residuals: dict[int, float]
    cuts: tuple[int, ...]
    kept: bool = True


class _InFlightRound:
    """A round that is being evaluated.

    slots: by index, the slot of the draft.
    outstanding: the slots whose predictions have not arrived.
    depth: the number of rounds that waited for each other up to this one.
    """

    def __init__(self, slots: dict[int, int], depth: int) -> None:
        self.slots, self.outstanding, self.depth = slots, set(slots.values()), depth

    def copy(self) -> _InFlightRound:
        """Return a copy of the round's current state."""
        copied = _InFlightRound(self.slots, self.depth)
        copied.outstanding = set(self.outstanding)
        return copied


class Run:
    """The arithmetic of one run: `rounds()` yields the tasks of each round, `refine()` computes the final states.

    start: the state at index 0, [B, ...].
    drafts: a matrix [slots(solver, mode), D] of the state's dtype, one slot per row, where D is the number of elements
        of a state.
    predictions: a matrix with at least as many rows. The prediction of a task is written to the row with the number of
        its slot, or to any row that is not in `rows`, which is then passed to `accumulate`.
    noise: for a solver that adds noise.
    watch: compute the residuals of all drafts in a mode without feedback.
    queue: if given, the arithmetic on drafts, predictions and states is enqueued there. Reads of these must be enqueued
        as well, and `watch` must not be used.
    checkpoints: reserve memory for two checkpoints.

    The attributes:

    rounds_done: the number of rounds whose predictions were used; where rounds do not wait for all earlier ones, the
        length of the longest sequence of rounds that waited for each other.
    steps_done: the number of final states.
    residuals: by index, the distance between the refined state and the draft of the last prediction there, relative to
        the state's norm; the maximum over the samples. Only in a mode with feedback, or with `watch`.
    cuts: the indices to which a mode with feedback advanced although it had predictions beyond.
    evaluated: how many times each index was evaluated. A later prediction replaces an earlier one.
    """

    def __init__(
        self,
        solver: Solver,
        mode: Mode,
        start: Tensor,
        drafts: Tensor,
        predictions: Tensor,
        noise: Noise | None = None,
        watch: bool = False,
        queue: OperationQueue | None = None,
        checkpoints: bool = False,
    ) -> None:
        self._queue = queue
        self._add: Add = _add if queue is None else lambda *terms: queue.enqueue(partial(_add, *terms))
        self._timesteps = [float(t) for t in solver.grid.timesteps]
        self._shape, self._start = start.shape, start.reshape(-1)
        self._drafts, self._predictions, self._noise = drafts, predictions, noise
        self._feedback, self._watch = mode.feedback, watch and not mode.feedback
        # Coefficients are computed while the previous round is evaluated; with feedback, once it is complete.
        self._plan = _plan(solver, mode, start, self._measure)
        self._position = 0  # of the next event in the plan
        self._slot_banks, self._state_banks = (
            _room(solver, mode, width, checkpoints) for width in (mode.width, self._plan.longest)
        )
        self._checkpoints: list[Checkpoint] = []
        self._slots: dict[int, int] = {}  # index -> row of drafts
        self._answers: dict[int, int] = {}  # row of drafts -> row of predictions
        self._rows: dict[int, int] = {}  # index -> row of states
        self._states = start.new_empty((self._state_banks.rows, start.numel()))
        self._fresh: dict[int, Tensor] = {}
        self._noise_ahead = 2 * mode.width + 2 if solver.adds_noise else 0
        if solver.adds_noise and noise is None:
            raise ValueError(f"{type(solver).__name__} adds noise at each step; give `noise`")
        self._measured: tuple[int, list[float]] = (0, [])  # first row of the last round's states, their residuals
        self._to_refine: deque[tuple[_Advance, int]] = deque()
        self._in_flight: deque[_InFlightRound] = deque()  # rounds that are not in _slots yet, oldest first
        self._plan_ahead = 2 * mode.width if mode.pipelined else 2
        self._partial_states: _PartialSum | None = None
        self._first = 0  # first row of the states being accumulated
        self._partial_drafts: _PartialSum | None = None
        self._first_slot = 0  # first slot of the drafts being computed
        self.rounds_done = 0
        self.steps_done = 0
        self.residuals: dict[int, float] = {}
        self.cuts: list[int] = []
        self.evaluated = [0] * solver.grid.steps

    @property
    def state(self) -> Tensor:
        """The latest refined state [B, ...]; after the run, the samples."""
        return self._vector(state(self.steps_done)).view(self._shape)

    @property
    def ready(self) -> bool:
        """Whether the next round can be requested: all predictions that it uses were passed to `accumulate`."""
        return not any(out.outstanding for out in self._used())

    def rounds(self) -> Iterator[list[Task]]:
        """Yield each round's tasks, whose drafts are written. Request the next round only while `ready` is True.

        Call `refine` between rounds, preferably while the new tasks are being evaluated, and once at the end.
        """
        while (event := self._next()) is not None:
            self._position += 1
            if isinstance(event, _Advance):
                self._advance(event)
                continue
            fold = self._partial_drafts or self._draft(event)
            self._partial_drafts = None
            fold.accumulate(self._vector)
            slots = range(self._first_slot, self._first_slot + len(event.indices))
            self._answers.update(zip(slots, slots, strict=True))
            self._in_flight.append(_InFlightRound(dict(zip(event.indices, slots, strict=True)), self.rounds_done + 1))
            for k in event.indices:
                self.evaluated[k] += 1
            yield [Task(k, self._timesteps[k], slot) for k, slot in zip(event.indices, slots, strict=True)]

    def _next(self) -> _Predict | _Advance | None:
        """Return the next event, after making the predictions that it uses available."""
        for out in self._used():
            self._slots.update(out.slots)
            self.rounds_done = max(self.rounds_done, out.depth)
            self._in_flight.popleft()
        return self._plan.get(self._position)

    def _used(self) -> list[_InFlightRound]:
        """Return the rounds in flight that the next event uses: all of them with feedback, whose event is unknown."""
        event = None if self._feedback else self._plan.get(self._position)
        return list(self._in_flight)[: len(self._in_flight) - (event.unawaited_rounds if event is not None else 0)]

    @property
    def rows(self) -> set[int]:
        """The rows of `predictions` that are in use, including those that checkpoints refer to."""
        rows = {self._answers[slot] for slot in _answered(self._in_flight).union(self._slots.values())}
        for kept in self._checkpoints:
            rows.update(kept.answers[slot] for slot in _answered(kept.out).union(kept.slots.values()))
        return rows

    def accumulate(self, slot: int, row: int | None = None) -> None:
        """Record a draft's prediction, in `row`, and add it to the states from which the next drafts start.

        May be called as predictions arrive, in any order. They are added in index order, each as soon as the earlier
        ones are there; the rest is added when the next round is requested. In a mode with feedback, whose next event is
        not known in advance, none is added here.
        """
        self._answers[slot] = slot if row is None else row
        for out in self._in_flight:
            out.outstanding.discard(slot)
        self._accumulate_known()

    def _accumulate_known(self) -> None:
        """Add known terms to the states from which the next drafts start, up to the first missing prediction."""
        event = None if self._feedback else self._plan.get(self._position)
        if isinstance(event, _Advance):
            if self._partial_states is None:
                self._partial_states = self._begin(event)
            self._add_known(self._partial_states, self._used())

    def _draft_known(self) -> None:
        """Add known terms to the next drafts, if their round waits for all earlier rounds and slots are free."""
        event = self._plan.get(self._position)
        if isinstance(event, _Advance):
            event = self._plan.get(self._position + 1)
        if isinstance(event, _Predict) and not event.unawaited_rounds:
            if (
                self._partial_drafts is None
                and self._slot_banks.find(len(event.indices), self._slots_in_use) is not None
            ):
                self._partial_drafts = self._draft(event)
            if self._partial_drafts is not None:
                self._add_known(self._partial_drafts, self._in_flight)

    def _add_known(self, fold: _PartialSum, used: Collection[_InFlightRound]) -> None:
        """Add terms up to the first that is not available: a missing prediction, or a state not computed yet."""
        missing = set().union(*(out.outstanding for out in used))
        newest = {k: slot for out in used for k, slot in out.slots.items()}

        def there(term: Symbol) -> bool:
            if term.kind == "state":
                return term.k == 0 or term.k in self._rows
            return term.kind != "prediction" or newest.get(term.k) not in missing

        fold.accumulate(lambda term: self._vector(term, newest), there)

    def checkpoint(self) -> Checkpoint:
        """Keep the run's current state, just after `rounds` has yielded. There is memory for two checkpoints."""
        kept = Checkpoint(
            self._position,
            dict(self._slots),
            dict(self._answers),
            dict(self._rows),
            self._measured,
            tuple(self._to_refine),
            tuple(out.copy() for out in self._in_flight),
            self.rounds_done,
            self.steps_done,
            dict(self.residuals),
            tuple(self.cuts),
        )
        self._checkpoints.append(kept)
        return kept

    def drop(self, checkpoint: Checkpoint) -> None:
        """Release a checkpoint."""
        checkpoint.kept = False
        self._checkpoints.remove(checkpoint)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Return to a checkpoint that is kept; later checkpoints are dropped. Call `rounds` again afterwards.

        With feedback, only the last round can be restored, since the results of earlier rounds have determined the
        following ones. Drafts that had no prediction at the checkpoint are in their slots. Operations that were queued
        since must have no effect any more.
        """
        for later in self._checkpoints[self._checkpoints.index(checkpoint) + 1 :]:
            self.drop(later)
        self._position = checkpoint.position
        self._slots, self._answers = dict(checkpoint.slots), dict(checkpoint.answers)
        self._rows, self._measured = dict(checkpoint.rows), checkpoint.ahead
        self._to_refine = deque(checkpoint.to_refine)
        self._in_flight = deque(out.copy() for out in checkpoint.out)
        self._partial_states = self._partial_drafts = None
        self.rounds_done, self.steps_done = checkpoint.rounds_done, checkpoint.steps_done
        self.residuals = dict(checkpoint.residuals)
        self.cuts[:] = checkpoint.cuts

    def refine(self, callback: Callback | None = None, between: bool | None = None) -> None:
        """Compute the states that finished rounds have made final; call `callback` for each, in order.

        Intermediate states that nothing else depends on are computed if `between`, by default for a callback or
        residuals.
        """
        wanted = between if between is not None else callback is not None or self._watch
        while self._to_refine:
            event, first = self._to_refine.popleft()
            if wanted:
                event.between.write(self._vector, self._states[first : first + len(event) - event.eager], self._add)
            for k, x in enumerate(self._states[first : first + len(event)], start=event.base + 1):
                self.steps_done = k
                if self._watch and (given := self.draft_at(k)) is not None:
                    self.residuals[k] = residual(x, given, self._shape[0])
                if callback is not None:
                    callback(k, x.view(self._shape))
            for known in (self._slots, self._rows, self._fresh):
                for k in [k for k in known if k < event.oldest and k != event.previous_base]:
                    del known[k]
        if not self._feedback:
            for ahead in range(self._plan_ahead):  # compute the plan up to the next drafts
                self._plan.get(self._position + ahead)
        for k in range(self.steps_done, min(self.steps_done + self._noise_ahead, len(self._timesteps))):
            self._draw(k)
        self._accumulate_known()
        if not self._feedback:
            self._draft_known()

    @property
    def _slots_in_use(self) -> Iterator[int]:
        for slots, rounds in ((self._slots, self._in_flight), *((kept.slots, kept.out) for kept in self._checkpoints)):
            yield from slots.values()
            for out in rounds:
                yield from out.slots.values()

    def _make_room(self, banks: SlotAllocator, rows: int, used: Callable[[], Iterable[int]]) -> int:
        """Allocate consecutive rows, dropping checkpoints, oldest first, if there is no room."""
        while self._checkpoints and banks.find(rows, used()) is None:
            self.drop(self._checkpoints[0])
        return banks.allocate(rows, used())

    def _draft(self, event: _Predict) -> _PartialSum:
        """Allocate slots for drafts, and begin to compute them."""
        self._first_slot = self._make_room(self._slot_banks, len(event.indices), lambda: self._slots_in_use)
        slots = self._drafts[self._first_slot : self._first_slot + len(event.indices)]
        return _PartialSum(event.drafts, slots, self._add)

    def _advance(self, event: _Advance) -> None:
        """Compute the state from which the next round starts; `refine` computes the others off the critical path."""
        end = event.base + len(event)
        if self._feedback:  # The states are computed already, except one past the last prediction.
            first, residuals = self._measured
            self.residuals.update(enumerate(residuals[: len(event)], start=event.base + 1))
            if len(event) < len(residuals):
                self.cuts.append(end)
            fold = (
                None if len(event) <= len(residuals) else _PartialSum(event.last, self._eager(event, first), self._add)
            )
        else:
            fold = self._partial_states or self._begin(event)
            first = self._first
            self._partial_states = None
        if fold is not None:
            fold.accumulate(self._vector)
        self._rows.update({event.base + 1 + i: first + i for i in range(len(event) - event.eager, len(event))})
        self._to_refine.append((event, first))

    def _begin(self, event: _Advance) -> _PartialSum:
        """Allocate rows for the states of an advance, and begin to compute the last ones."""
        self._first = self._take_states(len(event))
        return _PartialSum(event.last, self._eager(event, self._first), self._add)

    def _take_states(self, count: int) -> int:
        return self._make_room(self._state_banks, count, lambda: self._states_in_use)

    @property
    def _states_in_use(self) -> Iterator[int]:
        kept = ((each.rows, each.to_refine) for each in self._checkpoints)
        for rows, to_refine in ((self._rows, self._to_refine), *kept):
            yield from rows.values()
            for event, first in to_refine:
                yield from range(first, first + len(event))

    def _eager(self, event: _Advance, first: int) -> Tensor:
        return self._states[first + len(event) - event.eager : first + len(event)]

    def _measure(self, base: int, rows: tuple[LinearCombination, ...]) -> Sequence[float]:
        """Compute the states from base + 1 to the last predicted index; return their residuals."""
        first = self._take_states(len(rows))
        states = self._states[first : first + len(rows)]
        _Rows(rows, states, _state_order).write(self._vector, states, self._add)
        if self._queue is not None:
            self._queue.synchronize()
        residuals = [
            residual(x, self._drafts[self._slots[k]], self._shape[0]) for k, x in enumerate(states, start=base + 1)
        ]
        self._measured = (first, residuals)
        return residuals

    def draft_at(self, k: int) -> Tensor | None:
        """Return the draft [D] of the prediction at index k, None if it is not kept any more."""
        return self._drafts[self._slots[k]] if k in self._slots else None

    def _vector(self, term: Symbol, newest: Mapping[int, int] = MappingProxyType({})) -> Tensor:
        """Return the tensor [D] of a symbol. `newest` has, by index, slots of rounds that are still in flight."""
        k = term.k
        if term.kind == "state":
            return self._states[self._rows[k]] if k else self._start
        if term.kind == "noise":
            return self._draw(k)
        slot = newest[k] if k in newest else self._slots[k]
        return self._drafts[slot] if term.kind == "input" else self._predictions[self._answers[slot]]

    def _draw(self, k: int) -> Tensor:
        if k not in self._fresh:
            assert self._noise is not None
            self._fresh[k] = self._noise(k).reshape(-1)
        return self._fresh[k]


def _answered(rounds: Iterable[_InFlightRound]) -> set[int]:
    return {slot for out in rounds for slot in out.slots.values() if slot not in out.outstanding}


def residual(x: Tensor, given: Tensor, samples: int) -> float:
    """Return the relative distance of a state [B * D] from the draft at its index, the maximum over the samples.

    numpy is used because its order of summation does not depend on the number of threads, so that a mode's decisions
    are reproducible.
    """
    x = x.double()
    apart = (x - given.double()).view(samples, -1).cpu().numpy()
    norms = np.sqrt(np.square(apart).sum(axis=1) / np.square(x.view(samples, -1).cpu().numpy()).sum(axis=1))
    return float(norms.max())


class _Known:
    """The events of a plan that any run has computed so far. They do not refer to the solver."""

    def __init__(self) -> None:
        self.events: list[_Predict | _Advance] = []
        self.complete = False
        self.lock = threading.Lock()


class _Plan:
    """The events of a run in order, computed on demand. Thread-safe.

    `events` generates all events of the run; those that other runs have computed are in `known` and are skipped.
    """

    def __init__(self, events: Iterator[Predict | Advance], like: Tensor, longest: int, known: _Known) -> None:
        self.longest = longest
        self._events, self._passed, self._like, self._known = events, 0, like, known

    def get(self, position: int) -> _Predict | _Advance | None:
        """Return the event at a position, None past the end."""
        known = self._known
        if position >= len(known.events) and not known.complete:
            with known.lock:
                # Another thread may have computed the event in the meantime.
                there = len(known.events)
                if position >= there and not known.complete:
                    new = itertools.islice(self._events, there - self._passed, position + 1 - self._passed)
                    known.events += (_cast(event, self._like) for event in new)
                    self._passed = len(known.events)
                    known.complete = self._passed <= position
        return known.events[position] if position < len(known.events) else None


_plans: WeakKeyDictionary[Solver, dict[tuple[Mode, torch.dtype, torch.device, int], _Known]] = WeakKeyDictionary()
"""Cache of events, which are the same for all runs with the same solver and mode without feedback.

Only computed events are cached: an unfinished generator would refer to the solver and keep it alive forever.
"""


def _plan(solver: Solver, mode: Mode, like: Tensor, measure: Measure) -> _Plan:
    if mode.feedback:
        return _Plan(make_plan(solver, mode, measure), like, mode.width + 1, _Known())
    like = like.new_empty(0)  # The cached events outlive the run and must not keep its state alive.
    known = _Known()
    with contextlib.suppress(TypeError):  # A user's mode may not be hashable.
        stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0  # copies the weights
        known = _plans.setdefault(solver, {}).setdefault((mode, like.dtype, like.device, stream), known)
    return _Plan(make_plan(solver, mode), like, max_advance(mode, solver.grid.steps), known)


class _Predict:
    """A round whose coefficients have the state's dtype and device."""

    def __init__(self, event: Predict, like: Tensor) -> None:
        self.indices, self.unawaited_rounds = event.indices, event.unawaited_rounds
        self.drafts = _Rows(event.drafts, like, _draft_order)


class _Advance:
    """An advance whose coefficients have the state's dtype and device. Its length is the number of steps.

    The last `eager` states, which a step from the new base uses, are computed before the next round's drafts.
    """

    def __init__(self, event: Advance, like: Tensor) -> None:
        self.base, self.oldest, self.previous_base, self.unawaited_rounds = (
            event.base,
            event.oldest,
            event.previous_base,
            event.unawaited_rounds,
        )
        self._length = len(event.states)
        self.eager = min(self._length, event.base + self._length - event.oldest + 1)
        split = self._length - self.eager
        self.between = _Rows(event.states[:split], like, _state_order)
        self.last = _Rows(event.states[split:], like, _state_order)

    def __len__(self) -> int:
        return self._length


def _cast(event: Predict | Advance, like: Tensor) -> _Predict | _Advance:
    return _Predict(event, like) if isinstance(event, Predict) else _Advance(event, like)


_ORDER = {"state": 0, "input": 1, "noise": 2, "prediction": 3}
SumOrder = Callable[[Symbol], tuple[int, ...]]
"""The sort key by which terms are added: fixed, whatever the order in which predictions arrive."""


def _state_order(t: Symbol) -> tuple[int, ...]:
    """Order of the terms of states: known terms first, then predictions by index."""
    return _ORDER[t.kind], t.k


def _draft_order(t: Symbol) -> tuple[int, ...]:
    """Order of the terms of drafts: known terms first, then states and predictions by index."""
    return t.kind in ("state", "prediction"), t.k, _ORDER[t.kind]


class _Rows:
    """Several linear combinations of the same terms, as one small matrix product."""

    def __init__(self, rows: Sequence[LinearCombination], like: Tensor, order: SumOrder) -> None:
        self.terms = sorted({t for row in rows for t in row}, key=order)
        weights = torch.tensor(
            [[row.get(t, 0.0) for row in rows] for t in self.terms], dtype=torch.float64, device="cpu"
        )
        weights = weights.to(like.dtype)
        if like.is_cuda:
            weights = weights.pin_memory()  # Otherwise the host would wait for all work queued on the stream.
        self.weights = weights.to(like.device, non_blocking=True).reshape(len(self.terms), len(rows), 1)

    def write(self, vector: Callable[[Symbol], Tensor], out: Tensor, add: Add) -> None:
        """Write row i into `out[i]`; `out` is [rows, D]."""
        _PartialSum(self, out, add).accumulate(vector)


def _add(out: Tensor, weight: Tensor, term: Tensor, first: bool) -> None:
    """Add a weighted term to the sums in `out`, or initialize them with it."""
    if first:
        torch.mul(weight, term, out=out)
    else:
        out.addcmul_(weight, term)


class _PartialSum:
    """Partial sums of linear combinations; terms are added in order, as far as they are ready."""

    def __init__(self, rows: _Rows, out: Tensor, add: Add) -> None:
        self._rows, self._out, self._add, self._done = rows, out, add, 0

    def accumulate(
        self, vector: Callable[[Symbol], Tensor], ready: Callable[[Symbol], bool] = lambda term: True
    ) -> None:
        """Add the terms up to the first that is not ready."""
        terms, weights = self._rows.terms, self._rows.weights
        while self._done < len(terms) and ready(terms[self._done]):
            self._add(self._out, weights[self._done], vector(terms[self._done]), self._done == 0)
            self._done += 1
