"""The arithmetic of one sampling run, without processes: schedules drafts, adds predictions and refines states."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from torch import Tensor

from drp.sampling.cached_plan import PlannedAdvance, PlannedRound, make_cached_plan
from drp.sampling.checkpoint import Checkpoint, InFlightRound
from drp.sampling.linear import LinearCombination
from drp.sampling.modes import Mode
from drp.sampling.partial_sums import Add, OperationQueue, PartialSum, Rows, add_terms, state_order
from drp.sampling.residuals import residual
from drp.sampling.slot_allocator import SlotAllocator, make_allocator
from drp.sampling.solvers import Solver

Callback = Callable[[int, Tensor], None]
"""Called with the number of steps done, 1..N in order, and that state [B, ...]."""

Noise = Callable[[int], Tensor]
"""Called with a step's index; returns standard normal numbers shaped like the state, the same on every call."""

_SLOTS, _ROWS = attrgetter("slots", "in_flight"), attrgetter("rows", "to_refine")  # of checkpoints


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

        _plan, _position, _event       the plan; its next event's position; this event, None if unknown
        _in_flight, _outstanding       rounds whose predictions were not used yet; slots without prediction
        _slots, _answers               by index, the slot of its draft; by slot, the row of its prediction
        _next_slots                    `_slots` with the rounds in flight whose predictions the next event uses
        _awaited                       the slots of these rounds
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
        self._add: Add = add_terms if queue is None else partial(queue.enqueue, add_terms)
        self._timesteps = [float(t) for t in solver.grid.timesteps]
        self._shape, self._start = start.shape, start.reshape(-1)
        self._drafts, self._predictions, self._noise = drafts, predictions, noise
        self._feedback, self._watch = mode.feedback, watch and not mode.feedback
        # Coefficients are computed while the previous round is evaluated; with feedback, once it is complete.
        self._plan = make_cached_plan(solver, mode, start, self._measure)
        self._position = 0  # of the next event in the plan
        self._slot_banks = make_allocator(solver, mode, mode.width, checkpoints)
        self._state_banks = make_allocator(solver, mode, self._plan.longest, checkpoints)
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
        self._in_flight: list[InFlightRound] = []  # rounds that are not in _slots yet, oldest first
        self._outstanding: set[int] = set()
        self._plan_ahead = 2 * mode.width if mode.pipelined else 2
        self._partial_states: PartialSum | None = None
        self._first = 0  # first row of the states being accumulated
        self._partial_drafts: PartialSum | None = None
        self._first_slot = 0  # first slot of the drafts being computed
        self.rounds_done = self.steps_done = 0
        self.residuals: dict[int, float] = {}
        self.cuts: list[int] = []
        self.evaluated = [0] * solver.grid.steps
        self._look_ahead()

    @property
    def state(self) -> Tensor:
        """The latest refined state [B, ...]; after the run, the samples."""
        x = self._states[self._rows[self.steps_done]] if self.steps_done else self._start
        return x.view(self._shape)

    @property
    def ready(self) -> bool:
        """Whether the next round can be requested: all predictions that it uses were passed to `accumulate`."""
        return self._outstanding.isdisjoint(self._awaited)

    def rounds(self) -> Iterator[list[Task]]:
        """Yield each round's tasks, whose drafts are written. Request the next round only while `ready` is True.

        Call `refine` between rounds, preferably while the new tasks are being evaluated, and once at the end.
        """
        while (event := self._next()) is not None:
            self._position += 1
            if isinstance(event, PlannedAdvance):
                self._advance(event)
                self._look_ahead()
                continue
            drafts = self._partial_drafts or self._draft(event, self._allocate(self._slot_banks, len(event.indices)))
            self._partial_drafts = None
            self._add_known(drafts, self._slots)
            slots = range(self._first_slot, self._first_slot + len(event.indices))
            self._answers.update(zip(slots, slots, strict=True))
            self._outstanding.update(slots)
            self._in_flight.append(InFlightRound(dict(zip(event.indices, slots, strict=True)), self.rounds_done + 1))
            self._look_ahead()
            tasks = []
            for k, slot in zip(event.indices, slots, strict=True):
                self.evaluated[k] += 1
                tasks.append(Task(k, self._timesteps[k], slot, self._position))
            yield tasks

    def _next(self) -> PlannedRound | PlannedAdvance | None:
        """Return the next event, after making the predictions that it uses available."""
        while self._awaited:
            out = self._in_flight.pop(0)
            self._awaited.difference_update(out.slots.values())
            self._outstanding.difference_update(out.slots.values())
            self.rounds_done = max(self.rounds_done, out.depth)
        self._slots = self._next_slots
        return self._plan.get(self._position) if self._feedback else self._event

    def _look_ahead(self) -> None:
        """Find the next event, and which predictions it uses: with feedback, whose event is not known yet, all."""
        self._event = None if self._feedback else self._plan.get(self._position)
        unawaited = self._event.unawaited_rounds if self._event is not None else 0
        self._next_slots, self._awaited = dict(self._slots), set[int]()
        for out in self._in_flight[: len(self._in_flight) - unawaited]:
            self._next_slots.update(out.slots)
            self._awaited.update(out.slots.values())

    @property
    def rows(self) -> set[int]:
        """The rows of `predictions` that are in use, including those that checkpoints refer to."""
        rows: set[int] = set()
        current = self._answers, self._slots, self._in_flight, self._outstanding
        kept = ((each.answers, each.slots, each.in_flight, each.outstanding) for each in self._checkpoints)
        for answers, slots, rounds, outstanding in (current, *kept):
            rows.update(answers[slot] for slot in slots.values())
            rows.update(answers[slot] for out in rounds for slot in out.slots.values() if slot not in outstanding)
        return rows

    def accumulate(self, slot: int, row: int | None = None) -> None:
        """Record a draft's prediction, in `row`, and add it to the states from which the next drafts start.

        May be called as predictions arrive, in any order. They are added in index order, each as soon as the earlier
        ones are there; the rest is added when the next round is requested. In a mode with feedback, whose next event is
        not known in advance, none is added here.
        """
        self._answers[slot] = slot if row is None else row
        self._outstanding.discard(slot)
        self._accumulate_known()

    def _accumulate_known(self) -> None:
        """Add known terms to the states from which the next drafts start, up to the first missing prediction."""
        if isinstance(self._event, PlannedAdvance):
            if self._partial_states is None:
                self._partial_states = self._begin(self._event)
            self._add_known(self._partial_states, self._next_slots)

    def _draft_known(self) -> None:
        """Add known terms to the next drafts, if their round waits for all earlier rounds and slots are free."""
        event = self._event
        if isinstance(event, PlannedAdvance):
            event = self._plan.get(self._position + 1)
        if isinstance(event, PlannedRound) and not event.unawaited_rounds:
            if self._partial_drafts is None:
                first = self._slot_banks.find(len(event.indices), self._slots_in_use())
                if first is None:
                    return
                self._partial_drafts = self._draft(event, first)
            self._add_known(self._partial_drafts, self._next_slots)

    def checkpoint(self) -> Checkpoint:
        """Keep the run's current state, just after `rounds` has yielded. There is memory for two checkpoints."""
        kept = Checkpoint(
            self._position,
            dict(self._slots),
            dict(self._answers),
            dict(self._rows),
            self._measured,
            tuple(self._to_refine),
            tuple(self._in_flight),
            frozenset(self._outstanding),
            self.rounds_done,
            self.steps_done,
            dict(self.residuals),
            tuple(self.cuts),
        )
        self._checkpoints.append(kept)
        return kept

    def drop(self, checkpoint: Checkpoint) -> None:
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
        self._in_flight, self._outstanding = list(checkpoint.in_flight), set(checkpoint.outstanding)
        self._partial_states = self._partial_drafts = None
        self.rounds_done, self.steps_done = checkpoint.rounds_done, checkpoint.steps_done
        self.residuals = dict(checkpoint.residuals)
        self.cuts[:] = checkpoint.cuts
        self._look_ahead()

    def refine(self, callback: Callback | None = None, between: bool | None = None) -> None:
        """Compute the states that finished rounds have made final; call `callback` for each, in order.

        Intermediate states that nothing else depends on are computed if `between`, by default for a callback or
        residuals.
        """
        wanted = between if between is not None else callback is not None or self._watch
        while self._to_refine:
            event, first = self._to_refine.popleft()
            if wanted:
                states = self._states[first : first + event.steps - event.eager]
                self._add_known(PartialSum(event.between, states, self._add), self._slots)
            for k, x in enumerate(self._states[first : first + event.steps].unbind(), event.base + 1):
                self.steps_done = k
                if self._watch and (given := self.draft_at(k)) is not None:
                    self.residuals[k] = residual(x, given, self._shape[0])
                if callback is not None:
                    callback(k, x.view(self._shape))
            for known in (self._slots, self._next_slots, self._rows, self._fresh):
                for k in list(known):
                    if k < event.oldest and k != event.previous_base:
                        del known[k]
        for k in range(self.steps_done, min(self.steps_done + self._noise_ahead, len(self._timesteps))):
            self._draw(k)
        if not self._feedback:
            self._plan.get(self._position + self._plan_ahead - 1)  # compute the plan up to the next drafts
            self._accumulate_known()
            self._draft_known()

    def _slots_in_use(self) -> set[int]:
        used: set[int] = set()
        for slots, rounds in ((self._slots, self._in_flight), *map(_SLOTS, self._checkpoints)):
            used.update(slots.values())
            for out in rounds:
                used.update(out.slots.values())
        return used

    def _states_in_use(self) -> set[int]:
        used: set[int] = set()
        for rows, to_refine in ((self._rows, self._to_refine), *map(_ROWS, self._checkpoints)):
            used.update(rows.values())
            for event, first in to_refine:
                used.update(range(first, first + event.steps))
        return used

    def _allocate(self, banks: SlotAllocator, rows: int) -> int:
        """Allocate consecutive rows, dropping checkpoints, oldest first, if too few are free."""
        in_use = self._slots_in_use if banks is self._slot_banks else self._states_in_use
        while (first := banks.find(rows, in_use())) is None:
            if not self._checkpoints:
                raise banks.error(rows, in_use())
            self.drop(self._checkpoints[0])
        return first

    def _draft(self, event: PlannedRound, first: int) -> PartialSum:
        """Begin to compute drafts, in the slots from `first` on."""
        self._first_slot = first
        return PartialSum(event.drafts, self._drafts[first : first + len(event.indices)], self._add)

    def _advance(self, event: PlannedAdvance) -> None:
        """Compute the state from which the next round starts; `refine` computes the others off the critical path."""
        end = event.base + event.steps
        if self._feedback:  # The states are computed already, except one past the last prediction.
            first, residuals = self._measured
            self.residuals.update(enumerate(residuals[: event.steps], start=event.base + 1))
            if event.steps < len(residuals):
                self.cuts.append(end)
            if event.steps > len(residuals):
                self._add_known(PartialSum(event.last, self._eager(event, first), self._add), self._slots)
        else:
            states = self._partial_states or self._begin(event)
            first = self._first
            self._partial_states = None
            self._add_known(states, self._slots)
        for i in range(event.steps - event.eager, event.steps):
            self._rows[event.base + 1 + i] = first + i
        self._to_refine.append((event, first))

    def _begin(self, event: PlannedAdvance) -> PartialSum:
        """Allocate rows for the states of an advance, and begin to compute the last ones."""
        self._first = self._allocate(self._state_banks, event.steps)
        return PartialSum(event.last, self._eager(event, self._first), self._add)

    def _eager(self, event: PlannedAdvance, first: int) -> Tensor:
        return self._states[first + event.steps - event.eager : first + event.steps]

    def _measure(self, base: int, rows: tuple[LinearCombination, ...]) -> Sequence[float]:
        """Compute the states from base + 1 to the last predicted index; return their residuals."""
        first = self._allocate(self._state_banks, len(rows))
        states = self._states[first : first + len(rows)]
        self._add_known(PartialSum(Rows(rows, states, state_order), states, self._add), self._slots)
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

    def _add_known(self, sums: PartialSum, slots: Mapping[int, int]) -> None:
        """Add the terms up to the first that is not there yet; `slots` has the slots of drafts by index."""
        terms: list[Tensor] = []
        for kind, k in sums.missing:
            if kind == "noise":
                terms.append(self._draw(k))
            elif kind == "input":
                terms.append(self._drafts[slots[k]])
            elif kind == "state" and (k == 0 or k in self._rows):
                terms.append(self._states[self._rows[k]] if k else self._start)
            elif kind == "prediction" and slots[k] not in self._outstanding:
                terms.append(self._predictions[self._answers[slots[k]]])
            else:
                break
        if terms:
            sums.add(terms)

    def _draw(self, k: int) -> Tensor:
        if k not in self._fresh:
            assert self._noise is not None
            self._fresh[k] = self._noise(k).reshape(-1)
        return self._fresh[k]
