"""The arithmetic of one sampling run, without processes: schedules drafts, adds predictions and refines states."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from torch import Tensor

from drp.sampling.cached_plan import PlannedAdvance, PlannedRound, make_cached_plan
from drp.sampling.checkpoint import Checkpoint, InFlightRound
from drp.sampling.linear import LinearCombination, Symbol, state
from drp.sampling.modes import Mode
from drp.sampling.partial_sums import Add, OperationQueue, PartialSum, Rows, add_term, state_order
from drp.sampling.residuals import residual
from drp.sampling.slot_allocator import SlotAllocator, make_allocator
from drp.sampling.solvers import Solver

Callback = Callable[[int, Tensor], None]
"""Called with the number of steps done, 1..N in order, and that state [B, ...]."""

Noise = Callable[[int], Tensor]
"""Called with a step's index; returns standard normal numbers shaped like the state, the same on every call."""


@dataclass(frozen=True)
class Task:
    """One evaluation: the draft in `slot`, at `timestep`. Only tasks of the same round have the same `round`."""

    index: int
    timestep: float
    slot: int
    round: int = 0


def batches(tasks: Sequence[Task], size: int) -> list[tuple[Task, ...]]:
    """Split a round's tasks, in order, into batches of up to `size`, each of which one device evaluates at once."""
    return [tuple(tasks[first : first + size]) for first in range(0, len(tasks), size)]


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

    The state, beside the constants of the run:

        _plan, _position               the plan, and the position of its next event
        _in_flight                     rounds whose predictions were not used yet, oldest first
        _slots, _answers               by index, the slot of its draft; by slot, the row of its prediction
        _states, _rows                 the matrix of states; by index, the row of its state
        _slot_banks, _state_banks      which slots and rows of states are allocated together
        _partial_states, _first        the sum for the last states of the next advance, and the first row of its states
        _partial_drafts, _first_slot   the sum for the next drafts, and the first of their slots
        _to_refine                     advances whose intermediate states were not computed yet
        _measured                      with feedback: the first row and the residuals of the last round's states
        _fresh                         by index, the noise that was drawn
        _checkpoints                   checkpoints, whose slots and rows are not reused
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
        self._add: Add = add_term if queue is None else lambda *terms: queue.enqueue(partial(add_term, *terms))
        self._timesteps = [float(t) for t in solver.grid.timesteps]
        self._shape, self._start = start.shape, start.reshape(-1)
        self._drafts, self._predictions, self._noise = drafts, predictions, noise
        self._feedback, self._watch = mode.feedback, watch and not mode.feedback
        # Coefficients are computed while the previous round is evaluated; with feedback, once it is complete.
        self._plan = make_cached_plan(solver, mode, start, self._measure)
        self._position = 0  # of the next event in the plan
        self._slot_banks, self._state_banks = (
            make_allocator(solver, mode, width, checkpoints) for width in (mode.width, self._plan.longest)
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
        self._to_refine: deque[tuple[PlannedAdvance, int]] = deque()
        self._in_flight: deque[InFlightRound] = deque()  # rounds that are not in _slots yet, oldest first
        self._plan_ahead = 2 * mode.width if mode.pipelined else 2
        self._partial_states: PartialSum | None = None
        self._first = 0  # first row of the states being accumulated
        self._partial_drafts: PartialSum | None = None
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
            if isinstance(event, PlannedAdvance):
                self._advance(event)
                continue
            fold = self._partial_drafts or self._draft(event)
            self._partial_drafts = None
            fold.accumulate(self._vector)
            slots = range(self._first_slot, self._first_slot + len(event.indices))
            self._answers.update(zip(slots, slots, strict=True))
            self._in_flight.append(InFlightRound(dict(zip(event.indices, slots, strict=True)), self.rounds_done + 1))
            for k in event.indices:
                self.evaluated[k] += 1
            round_ = self._position  # in the plan, which is unique
            yield [Task(k, self._timesteps[k], slot, round_) for k, slot in zip(event.indices, slots, strict=True)]

    def _next(self) -> PlannedRound | PlannedAdvance | None:
        """Return the next event, after making the predictions that it uses available."""
        for out in self._used():
            self._slots.update(out.slots)
            self.rounds_done = max(self.rounds_done, out.depth)
            self._in_flight.popleft()
        return self._plan.get(self._position)

    def _used(self) -> list[InFlightRound]:
        """Return the rounds in flight that the next event uses: all of them with feedback, whose event is unknown."""
        event = None if self._feedback else self._plan.get(self._position)
        rounds = list(self._in_flight)
        return rounds if event is None else rounds[: len(rounds) - event.unawaited_rounds]

    @property
    def rows(self) -> set[int]:
        """The rows of `predictions` that are in use, including those that checkpoints refer to."""
        rows: set[int] = set()
        current = self._answers, self._slots, self._in_flight
        for answers, slots, rounds in (current, *((kept.answers, kept.slots, kept.out) for kept in self._checkpoints)):
            rows.update(answers[slot] for slot in slots.values())
            rows.update(answers[slot] for out in rounds for slot in out.answered)
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
        if isinstance(event, PlannedAdvance):
            if self._partial_states is None:
                self._partial_states = self._begin(event)
            self._add_known(self._partial_states, self._used())

    def _draft_known(self) -> None:
        """Add known terms to the next drafts, if their round waits for all earlier rounds and slots are free."""
        event = self._plan.get(self._position)
        if isinstance(event, PlannedAdvance):
            event = self._plan.get(self._position + 1)
        if isinstance(event, PlannedRound) and not event.unawaited_rounds:
            if (
                self._partial_drafts is None
                and self._slot_banks.find(len(event.indices), self._slots_in_use) is not None
            ):
                self._partial_drafts = self._draft(event)
            if self._partial_drafts is not None:
                self._add_known(self._partial_drafts, self._in_flight)

    def _add_known(self, fold: PartialSum, used: Collection[InFlightRound]) -> None:
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
        """Allocate consecutive rows, dropping checkpoints, oldest first, if too few are free."""
        while self._checkpoints and banks.find(rows, used()) is None:
            self.drop(self._checkpoints[0])
        return banks.allocate(rows, used())

    def _draft(self, event: PlannedRound) -> PartialSum:
        """Allocate slots for drafts, and begin to compute them."""
        self._first_slot = self._make_room(self._slot_banks, len(event.indices), lambda: self._slots_in_use)
        slots = self._drafts[self._first_slot : self._first_slot + len(event.indices)]
        return PartialSum(event.drafts, slots, self._add)

    def _advance(self, event: PlannedAdvance) -> None:
        """Compute the state from which the next round starts; `refine` computes the others off the critical path."""
        end = event.base + len(event)
        if self._feedback:  # The states are computed already, except one past the last prediction.
            first, residuals = self._measured
            self.residuals.update(enumerate(residuals[: len(event)], start=event.base + 1))
            if len(event) < len(residuals):
                self.cuts.append(end)
            fold = (
                None if len(event) <= len(residuals) else PartialSum(event.last, self._eager(event, first), self._add)
            )
        else:
            fold = self._partial_states or self._begin(event)
            first = self._first
            self._partial_states = None
        if fold is not None:
            fold.accumulate(self._vector)
        self._rows.update({event.base + 1 + i: first + i for i in range(len(event) - event.eager, len(event))})
        self._to_refine.append((event, first))

    def _begin(self, event: PlannedAdvance) -> PartialSum:
        """Allocate rows for the states of an advance, and begin to compute the last ones."""
        self._first = self._take_states(len(event))
        return PartialSum(event.last, self._eager(event, self._first), self._add)

    def _take_states(self, count: int) -> int:
        return self._make_room(self._state_banks, count, lambda: self._states_in_use)

    @property
    def _states_in_use(self) -> Iterator[int]:
        kept = ((each.rows, each.to_refine) for each in self._checkpoints)
        for rows, to_refine in ((self._rows, self._to_refine), *kept):
            yield from rows.values()
            for event, first in to_refine:
                yield from range(first, first + len(event))

    def _eager(self, event: PlannedAdvance, first: int) -> Tensor:
        return self._states[first + len(event) - event.eager : first + len(event)]

    def _measure(self, base: int, rows: tuple[LinearCombination, ...]) -> Sequence[float]:
        """Compute the states from base + 1 to the last predicted index; return their residuals."""
        first = self._take_states(len(rows))
        states = self._states[first : first + len(rows)]
        Rows(rows, states, state_order).write(self._vector, states, self._add)
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
