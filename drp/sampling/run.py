"""Run: the arithmetic of one sampling run, without processes: it forms drafts, takes predictions, refines."""

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
"""Called with a step's index; returns standard normal numbers like the state, the same ones whenever it is asked."""

Add = Callable[[Tensor, Tensor, Tensor, bool], None]


class OperationQueue(Protocol):
    """What does a run's arithmetic later than it is given, in that order."""

    def enqueue(self, do: Callable[[], object]) -> None:
        """Have this done after what was given before."""
        ...

    def synchronize(self) -> None:
        """Wait until all was done."""
        ...


@dataclass(frozen=True)
class Task:
    """One evaluation: the draft in `slot`, at `timestep`."""

    index: int
    timestep: float
    slot: int


def batches(tasks: Sequence[Task], size: int) -> list[tuple[Task, ...]]:
    """Return a round's tasks in their order, `size` of them together: what one device evaluates as one batch."""
    return [tuple(tasks[first : first + size]) for first in range(0, len(tasks), size)]


def slots(solver: Solver, mode: Mode, checkpoints: bool = False) -> int:
    """Return how many slots a run needs for drafts, and rows for as many predictions that are in use at once.

    With `checkpoints`, there is room for what two of them keep beside that, of the last few rounds.
    """
    return _room(solver, mode, mode.width, checkpoints).rows


def _rounds_kept(solver: Solver, mode: Mode) -> int:
    """Count the rounds that are in use at once.

    They are the one being evaluated, the one being refined, and its base's; the one the draft rule looks back on; and
    one for each index before that the solver uses.
    """
    usual = 3 + mode.rule.looks_back + solver.history
    return max(usual, 1 + most_in_use(mode, solver.grid.steps, solver.history)) if mode.gaps else usual


def _room(solver: Solver, mode: Mode, width: int, checkpoints: bool) -> SlotAllocator:
    """Return room for what is in use at once; in a mode that lags, of rounds of any length."""
    kept = _rounds_kept(solver, mode)
    more = ROUNDS_BACK if checkpoints else 0
    return SlotAllocator((2 * kept + more) * width, 1) if mode.pipelined else SlotAllocator(kept + more, width)


ROUNDS_BACK = 4
"""Rounds that a run can go back to a checkpoint by, as far as memory is concerned."""


@dataclass(eq=False)
class Checkpoint:
    """What a run had when it had formed the drafts of a round: `Run.restore` goes on from there again.

    Nothing is copied: as long as the run keeps it, the rows that it refers to are not used for anything else. `kept` is
    False once it was dropped.
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
    """A round that is being evaluated: the slots of its indices, those that are missing, and its depth."""

    def __init__(self, slots: dict[int, int], depth: int) -> None:
        self.slots, self.outstanding, self.depth = slots, set(slots.values()), depth

    def copy(self) -> _InFlightRound:
        """Return the round as it is now."""
        copied = _InFlightRound(self.slots, self.depth)
        copied.outstanding = set(self.outstanding)
        return copied


class Run:
    """One run: `rounds()` yields the tasks of each round, `refine()` computes the states behind it.

    `start` [B, ...] is the state at index 0. `drafts` is a matrix [slots(solver, mode), D] of its dtype, a slot a row,
    D the numbers in one state; `predictions` is one with at least as many rows. Whoever evaluates reads a task's slot
    and writes the prediction to the row of the same number, or to any that is not in `rows`, and says to `fold` which.
    `noise` is for a solver that adds some. A `queue` is given the arithmetic on drafts, predictions and states: whoever
    reads these puts that there too, and `watch` is left to him.

    `rounds_done` and `steps_done` count; where rounds need not wait for those before, `rounds_done` is the longest
    sequence of rounds that waited for each other. `residuals` say, by index, how far from the refined state the last
    prediction was taken, relative to that state's norm, the largest among the samples: of all drafts in a mode with
    feedback or with `watch`. `cuts` are the indices to which a mode with feedback advanced though it had predictions
    beyond. `evaluated` says how often each index was asked for: a later prediction takes the place of an earlier one.
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
        # Rows are worked out while the round before is being evaluated, or, with feedback, when that is known.
        self._plan = _plan(solver, mode, start, self._measure)
        self._position = 0  # in the plan, of what comes next
        self._slot_banks, self._state_banks = (
            _room(solver, mode, width, checkpoints) for width in (mode.width, self._plan.longest)
        )
        self._checkpoints: list[Checkpoint] = []
        self._slots: dict[int, int] = {}  # index -> row of drafts
        self._answers: dict[int, int] = {}  # that -> row of predictions
        self._rows: dict[int, int] = {}  # index -> row of states
        self._states = start.new_empty((self._state_banks.rows, start.numel()))
        self._fresh: dict[int, Tensor] = {}
        self._noise_ahead = 2 * mode.width + 2 if solver.adds_noise else 0
        if solver.adds_noise and noise is None:
            raise ValueError(f"{type(solver).__name__} adds noise at each step; give `noise`")
        self._measured: tuple[int, list[float]] = (0, [])  # where the last round's states lie, and their residuals
        self._to_refine: deque[tuple[_Advance, int]] = deque()
        self._in_flight: deque[_InFlightRound] = deque()  # what is not in _slots yet, oldest first
        self._plan_ahead = 2 * mode.width if mode.pipelined else 2
        self._partial_states: _PartialSum | None = None
        self._first = 0  # where the states being folded lie
        self._partial_drafts: _PartialSum | None = None
        self._first_slot = 0  # where the drafts being formed lie
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
        """Whether the next round may be asked for: every prediction that it uses is in, as `fold` was told."""
        return not any(out.outstanding for out in self._used())

    def rounds(self) -> Iterator[list[Task]]:
        """Yield each round's tasks, their drafts written; ask for the next once it is `ready`.

        Call `refine` between two rounds, best while the new tasks are being evaluated, and once at the end.
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
        """Return what comes next, with the predictions that it uses taken as there."""
        for out in self._used():
            self._slots.update(out.slots)
            self.rounds_done = max(self.rounds_done, out.depth)
            self._in_flight.popleft()
        return self._plan.get(self._position)

    def _used(self) -> list[_InFlightRound]:
        """Return the rounds under way that the next event uses; with feedback it is not known yet, and uses all."""
        event = None if self._feedback else self._plan.get(self._position)
        return list(self._in_flight)[: len(self._in_flight) - (event.unawaited_rounds if event is not None else 0)]

    @property
    def rows(self) -> set[int]:
        """The rows of `predictions` that are in use."""
        rows = {self._answers[slot] for slot in _answered(self._in_flight).union(self._slots.values())}
        for kept in self._checkpoints:
            rows.update(kept.answers[slot] for slot in _answered(kept.out).union(kept.slots.values()))
        return rows

    def accumulate(self, slot: int, row: int | None = None) -> None:
        """Take note of a draft's prediction, in `row`, and add it to the states that the next drafts start from.

        May be called for predictions as they arrive, in any order: they are added in index order, each as soon as those
        before it are in, and whatever is left is added when the next round is asked for. In a mode with feedback, whose
        way is not known before, none is added.
        """
        self._answers[slot] = slot if row is None else row
        for out in self._in_flight:
            out.outstanding.discard(slot)
        self._accumulate_known()

    def _accumulate_known(self) -> None:
        """Add what is known to the states that the next drafts start from, up to the first prediction missing."""
        event = None if self._feedback else self._plan.get(self._position)
        if isinstance(event, _Advance):
            if self._partial_states is None:
                self._partial_states = self._begin(event)
            self._add_known(self._partial_states, self._used())

    def _draft_known(self) -> None:
        """Add what is known to the next drafts, where each round waits for all before it, if there is room for them."""
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
        """Add the terms up to the first that is not there: a prediction that misses, or a state to be computed."""
        missing = set().union(*(out.outstanding for out in used))
        newest = {k: slot for out in used for k, slot in out.slots.items()}

        def there(term: Symbol) -> bool:
            if term.kind == "state":
                return term.k == 0 or term.k in self._rows
            return term.kind != "prediction" or newest.get(term.k) not in missing

        fold.accumulate(lambda term: self._vector(term, newest), there)

    def checkpoint(self) -> Checkpoint:
        """Keep what the run has now, when `rounds` has just yielded; a run made with `checkpoints` has room for two."""
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
        """Keep it no longer."""
        checkpoint.kept = False
        self._checkpoints.remove(checkpoint)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint that is kept; those after it are dropped. Ask for the `rounds` anew.

        With feedback, only the last round can be gone back to: what follows others was decided by what came of them.
        The drafts that had no prediction then are where they were. What was queued since must not matter any more.
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
        """Compute the states that finished rounds have passed; call `callback` for each, in order.

        Those between that nothing is made of are computed if `between` says so, by default for a callback or residuals.
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
            for ahead in range(self._plan_ahead):  # up to the next drafts
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
        """Return where there is room for so many rows, at the cost of the checkpoints if there is none beside them."""
        while self._checkpoints and banks.find(rows, used()) is None:
            self.drop(self._checkpoints[0])
        return banks.allocate(rows, used())

    def _draft(self, event: _Predict) -> _PartialSum:
        """Find slots for drafts, and begin to form them."""
        self._first_slot = self._make_room(self._slot_banks, len(event.indices), lambda: self._slots_in_use)
        slots = self._drafts[self._first_slot : self._first_slot + len(event.indices)]
        return _PartialSum(event.drafts, slots, self._add)

    def _advance(self, event: _Advance) -> None:
        """Compute the state that the next round starts from; leave the others to `refine`, where nobody waits."""
        end = event.base + len(event)
        if self._feedback:  # They are there already, except one past the last prediction.
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
        """Find room for the states of a way forward, and begin to compute the last ones."""
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
        """Return the draft [D] of which the prediction at k was made, if it is still there."""
        return self._drafts[self._slots[k]] if k in self._slots else None

    def _vector(self, term: Symbol, newest: Mapping[int, int] = MappingProxyType({})) -> Tensor:
        """Return what a term stands for; `newest` are slots that are not taken as there yet."""
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
    """Compare a state [B * D] with the input of the prediction there, like it: the largest among so many samples.

    numpy adds in one order whatever the threads: what a mode decides by this number is the same everywhere.
    """
    x = x.double()
    apart = (x - given.double()).view(samples, -1).cpu().numpy()
    norms = np.sqrt(np.square(apart).sum(axis=1) / np.square(x.view(samples, -1).cpu().numpy()).sum(axis=1))
    return float(norms.max())


class _Known:
    """The events of a plan that any run has worked out so far. They do not refer to the solver."""

    def __init__(self) -> None:
        self.events: list[_Predict | _Advance] = []
        self.complete = False
        self.lock = threading.Lock()


class _Plan:
    """What a run does, in order, worked out as far as anyone has asked; in threads at the same time, if need be.

    `events` are all of them, as this run works them out: it passes over those that are `known` from other runs.
    """

    def __init__(self, events: Iterator[Predict | Advance], like: Tensor, longest: int, known: _Known) -> None:
        self.longest = longest
        self._events, self._passed, self._like, self._known = events, 0, like, known

    def get(self, position: int) -> _Predict | _Advance | None:
        """Return what is at a position, None past the end."""
        known = self._known
        if position >= len(known.events) and not known.complete:
            with known.lock:
                # Another thread may have been here meanwhile.
                there = len(known.events)
                if position >= there and not known.complete:
                    new = itertools.islice(self._events, there - self._passed, position + 1 - self._passed)
                    known.events += (_cast(event, self._like) for event in new)
                    self._passed = len(known.events)
                    known.complete = self._passed <= position
        return known.events[position] if position < len(known.events) else None


_plans: WeakKeyDictionary[Solver, dict[tuple[Mode, torch.dtype, torch.device, int], _Known]] = WeakKeyDictionary()
"""Rows are the same for every run with the same solver and a mode without feedback: the next run finds them here.

Only what is known: a generator that is not at its end holds the solver, which would then never be let go.
"""


def _plan(solver: Solver, mode: Mode, like: Tensor, measure: Measure) -> _Plan:
    if mode.feedback:
        return _Plan(make_plan(solver, mode, measure), like, mode.width + 1, _Known())
    like = like.new_empty(0)  # What is known outlives the run.
    known = _Known()
    with contextlib.suppress(TypeError):  # a mode of somebody's own that has no hash
        stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0  # which copies the weights
        known = _plans.setdefault(solver, {}).setdefault((mode, like.dtype, like.device, stream), known)
    return _Plan(make_plan(solver, mode), like, max_advance(mode, solver.grid.steps), known)


class _Predict:
    """A round with its rows in the state's dtype, and on its device."""

    def __init__(self, event: Predict, like: Tensor) -> None:
        self.indices, self.unawaited_rounds = event.indices, event.unawaited_rounds
        self.drafts = _Rows(event.drafts, like, _draft_order)


class _Advance:
    """A way forward with its rows in the state's dtype, on its device; its length is that of the way.

    The last states are computed before the next round's drafts: the `eager` ones that a step from there looks back on.
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
"""In which terms are added: as they will be there, whatever order predictions arrive in, and whatever other terms."""


def _state_order(t: Symbol) -> tuple[int, ...]:
    """Of states: all but predictions are known before, and those come by their indices."""
    return _ORDER[t.kind], t.k


def _draft_order(t: Symbol) -> tuple[int, ...]:
    """Of drafts: states, too, come by their indices, each with the prediction there."""
    return t.kind in ("state", "prediction"), t.k, _ORDER[t.kind]


class _Rows:
    """Several rows over the same terms, as one small matrix product."""

    def __init__(self, rows: Sequence[LinearCombination], like: Tensor, order: SumOrder) -> None:
        self.terms = sorted({t for row in rows for t in row}, key=order)
        weights = torch.tensor(
            [[row.get(t, 0.0) for row in rows] for t in self.terms], dtype=torch.float64, device="cpu"
        )
        weights = weights.to(like.dtype)
        if like.is_cuda:
            weights = weights.pin_memory()  # else the host would wait for all that the stream has to do
        self.weights = weights.to(like.device, non_blocking=True).reshape(len(self.terms), len(rows), 1)

    def write(self, vector: Callable[[Symbol], Tensor], out: Tensor, add: Add) -> None:
        """Write row i into `out[i]`; `out` is [rows, D]."""
        _PartialSum(self, out, add).accumulate(vector)


def _add(out: Tensor, weight: Tensor, term: Tensor, first: bool) -> None:
    """Add a term to rows' sums, or begin them with it."""
    if first:
        torch.mul(weight, term, out=out)
    else:
        out.addcmul_(weight, term)


class _PartialSum:
    """Rows' sum under way: terms are added in their order, as far as they are ready."""

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
