"""Plans: the drafts and states of a run, as linear combinations, for a mode and a solver."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from drp.sampling.drafts import PAPER, DraftRule, Levels
from drp.sampling.linear import LinearCombination, Symbol, add, data, model_input, prediction, state, substitute
from drp.sampling.modes import Mode, Round
from drp.sampling.predictions import estimates
from drp.sampling.solvers import Solver


@dataclass(frozen=True)
class Predict:
    """A round: `drafts[j]` is the input of the evaluation at `indices[j]`.

    The predictions of the last `unawaited_rounds` rounds are not used.
    """

    indices: tuple[int, ...]
    drafts: tuple[LinearCombination, ...]
    unawaited_rounds: int


@dataclass(frozen=True)
class Advance:
    """The states from `base` + 1 on, in order.

    Afterwards nothing at an index below `oldest` is needed, except at `previous_base`. The predictions of the last
    `unawaited_rounds` rounds are not used.
    """

    base: int
    states: tuple[LinearCombination, ...]
    oldest: int
    previous_base: int | None
    unawaited_rounds: int


Measure = Callable[[int, tuple[LinearCombination, ...]], Sequence[float]]
"""(base, combinations of the states from base + 1 to the last predicted index) -> residuals."""


def make_plan(solver: Solver, mode: Mode, measure: Measure | None = None) -> Iterator[Predict | Advance]:
    """Yield the events of a run in order; raise ValueError if the mode's rounds are inconsistent.

    In a mode with feedback, `measure` is called for the residuals of each round, once its predictions have arrived.
    """
    steps = solver.grid.steps
    table = _SymbolTable(solver, mode.rule)
    rounds = mode.rounds(steps)
    r = next(rounds, None)
    while r is not None:
        table.progress.begin(r, mode, steps)
        if r.base > table.base:
            yield table.advance(r.base, r.unawaited_rounds, r.previous_base)
        yield table.predict(r)
        table.progress.in_flight.append(r)
        residuals: Sequence[float] = ()
        if mode.feedback:
            table.progress.receive(0)
            residuals = measure(table.base, table.ahead()) if measure else ()
        try:
            r = rounds.send(residuals) if mode.feedback else next(rounds, None)
        except StopIteration:
            r = None
    table.progress.end(mode, steps)
    yield table.advance(steps, 0, None)


def max_advance(mode: Mode, steps: int) -> int:
    """Return the longest advance, in steps, of a mode without feedback; raise ValueError as `make_plan` would."""
    progress, longest = PlanProgress(), 0
    for r in mode.rounds(steps):
        before = progress.base
        progress.begin(r, mode, steps)
        longest = max(longest, r.base - before)
        progress.base = r.base
        progress.in_flight.append(r)
    progress.end(mode, steps)
    return max(longest, steps - progress.base)


def max_rounds_in_use(mode: Mode, steps: int, history: int) -> int:
    """Return the maximum number of rounds or advances, in a mode with gaps, whose results are needed at once.

    Where indices are skipped, how long a prediction is needed depends on where its neighbours are evaluated.
    """
    progress, peak = PlanProgress(), 0
    rounds: dict[int, int] = {}  # by index, the round that predicted it last; `advances`: the advance to its state
    advances: dict[int, int] = {}
    for number, r in enumerate(mode.rounds(steps)):
        before = progress.base
        progress.begin(r, mode, steps)
        oldest = min(progress.known_at(before), progress.known_at(r.base - history))
        advances.update(dict.fromkeys(range(before + 1, r.base + 1), number))
        rounds.update(dict.fromkeys(r.predict, number))
        peak = max(peak, len(set(rounds.values())), len(set(advances.values())))
        rounds = {k: made for k, made in rounds.items() if k >= oldest}
        advances = {k: made for k, made in advances.items() if k >= oldest}
        progress.base = r.base
        progress.in_flight.append(r)
    return peak


def transition(
    solver: Solver, a: int, b: int, rule: DraftRule | None = None, previous_base: int | None = None
) -> LinearCombination:
    """Return the skip transition Phi(a -> b), 0 <= a < b <= N: x_b as a linear combination of what is known at a.

    It composes the solver's ordinary steps, with the estimates after a extrapolated by `rule`, by default the paper's.
    `previous_base` is another index whose prediction the rule may use.
    """
    table = _SymbolTable(solver, rule or PAPER)
    table.progress.base = table.progress.last = a
    table.progress.known = {a} if previous_base is None else {previous_base, a}
    table.previous_base = a if previous_base is None else previous_base
    return table.chain(b)[b]


class PlanProgress:
    """The symbolic progress of a run through its rounds, without numbers.

    base: the index of the run's state.
    known: the indices of the predictions that can be used.
    last: the largest index in `known`, -1 if there is none.
    in_flight: the rounds whose predictions cannot be used yet, oldest first.
    predicted_at_state: the indices whose prediction was made at the state itself, not at a draft.
    """

    def __init__(self) -> None:
        self.base, self.last = 0, -1
        self.known: set[int] = set()
        self.in_flight: deque[Round] = deque()
        self.predicted_at_state: set[int] = set()
        self.previous_base = 0
        """The smallest index that a later round may look back on."""

    def begin(self, r: Round, mode: Mode, steps: int) -> None:
        """Receive the predictions that a round uses; raise ValueError if the round breaks the rules."""
        if not 0 <= r.unawaited_rounds <= (len(self.in_flight) if mode.pipelined else 0):
            may = f"0 to {len(self.in_flight)}" if mode.pipelined else "none, unless it says that it `lags`"
            raise ValueError(f"{mode}: {r} has {r.unawaited_rounds} unawaited rounds; it may have {may}")
        self.receive(r.unawaited_rounds)
        _check_round(r, self, mode, steps)
        if r.previous_base is not None or r.base > self.base:
            self.previous_base = r.base if r.previous_base is None else r.previous_base

    def receive(self, unawaited_rounds: int) -> None:
        """Receive the predictions of all rounds in flight except the last `unawaited_rounds`."""
        while len(self.in_flight) > unawaited_rounds:
            r = self.in_flight.popleft()
            self.last = max(self.last, r.predict[-1])
            self.known.update(r.predict)
            if r.predict[0] == r.base:
                self.predicted_at_state.add(r.base)
            self.predicted_at_state.difference_update(k for k in r.predict if k != r.base)

    def known_at(self, k: int) -> int:
        """Return the largest index up to k whose prediction can be used; k itself if there is none."""
        return max((i for i in self.known if i <= k), default=k)

    def end(self, mode: Mode, steps: int) -> None:
        """Receive all predictions; raise ValueError if they do not reach the end."""
        self.receive(0)
        if self.last != steps - 1:
            raise ValueError(
                f"{mode} ends with a prediction at {self.last}; its rounds must lead to the last, {steps - 1}"
            )


class _SymbolTable:
    """Derives drafts and states, as linear combinations of what is known at the current point of a run."""

    def __init__(self, solver: Solver, rule: DraftRule) -> None:
        grid = solver.grid
        self._solver, self._rule = solver, rule
        alphas, sigmas, timesteps = (
            tuple(map(float, each[: grid.steps])) for each in (grid.alphas, grid.sigmas, grid.timesteps)
        )
        self._levels = Levels(alphas, sigmas, timesteps, solver.prediction_type)
        self._steps = [solver.step(k) for k in range(grid.steps)]
        self._reads = [
            estimates(solver.prediction_type, float(grid.alphas[k]), float(grid.sigmas[k])) for k in range(grid.steps)
        ]
        self.progress = PlanProgress()
        self.previous_base = 0

    @property
    def base(self) -> int:
        return self.progress.base

    def predict(self, r: Round) -> Predict:
        chain = self.chain(r.predict[-1])
        return Predict(r.predict, tuple(chain[k] for k in r.predict), r.unawaited_rounds)

    def advance(self, target: int, unawaited_rounds: int, previous_base: int | None) -> Advance:
        """Advance to `target`, which is at most one index past the last prediction."""
        chain, base = self.chain(target), self.base
        states = tuple(chain[k] for k in range(base + 1, target + 1))
        self.previous_base = self.progress.known_at(base if previous_base is None else previous_base)
        self.progress.base = target
        oldest = target - self._solver.history
        if oldest < self.progress.last:  # If this index was skipped, its neighbours are needed.
            oldest = self.progress.known_at(oldest)
        if not self._rule.looks_back:
            return Advance(base, states, oldest, None, unawaited_rounds)
        # A previous base that the mode chooses may later be any following index, so these are needed as well.
        return Advance(
            base,
            states,
            oldest if previous_base is None else min(oldest, self.previous_base),
            self.previous_base,
            unawaited_rounds,
        )

    def ahead(self) -> tuple[LinearCombination, ...]:
        """Return the states from base + 1 to the last predicted index."""
        last = self.progress.last
        chain = self.chain(last)
        return tuple(chain[k] for k in range(self.base + 1, last + 1))

    def chain(self, end: int) -> dict[int, LinearCombination]:
        """Return the states from `base` to `end` by ordinary steps, as linear combinations of what is known.

        Up to the last predicted index the steps use predictions; beyond it, the rule's extrapolation. At a skipped
        index between two predictions the estimate is interpolated. The upper prediction is then carried to the state at
        its index, which a first walk over the chain yields; that walk uses the estimate at the draft.
        """
        known = self.progress.known
        if all(k in known for k in range(max(0, self.base - self._solver.history), min(end, self.progress.last))):
            return self._walk(end, {})
        return self._walk(end, self._walk(max(end, self.progress.last), {}))

    def _walk(self, end: int, guess: Mapping[int, LinearCombination]) -> dict[int, LinearCombination]:
        """Return the states from `base` to `end`. `guess` has states for indices that are needed before their turn."""
        states: dict[int, LinearCombination] = {self.base: {state(self.base): 1.0}}

        def meaning(term: Symbol) -> LinearCombination:
            if term.kind == "state":
                return states.get(term.k) or guess.get(term.k) or {term: 1.0}
            if term.kind in ("data", "epsilon"):
                if term.k not in self.progress.known:
                    return substitute(self._extrapolate(term), meaning)
                there = term.k <= self.base or term.k in states or term.k in guess
                return substitute(self._estimate(term, None if there else 1.0), meaning)
            return {term: 1.0}

        for k in range(self.base, end):
            states[k + 1] = substitute(self._steps[k], meaning)
        return states

    def _estimate(self, term: Symbol, carry: float | None) -> LinearCombination:
        """Convert the prediction at an index to an estimate at its state. `carry` is the rule's if None."""
        k = term.k
        read = self._reads[k]
        if carry is None:
            carry = 0.0 if k in self.progress.predicted_at_state else self._rule.carry_at(k, self._levels)
        if term.kind == "data":
            at_state, at_input, output = read.data_x * (1 - carry), read.data_x * carry, read.data_p
        else:  # The remainder of the state: x = alpha data + sigma epsilon.
            shift = carry * float(self._solver.grid.alphas[k] / self._solver.grid.sigmas[k]) * read.data_x
            at_state, at_input, output = read.epsilon_x + shift, -shift, read.epsilon_p
        return add((1.0, {state(k): at_state, model_input(k): at_input, prediction(k): output}))

    def _extrapolate(self, term: Symbol) -> LinearCombination:
        """Return the estimate at an index without a prediction."""
        grid, k, last = self._solver.grid, term.k, self.progress.last
        if term.kind == "epsilon":
            scale = 1 / float(grid.sigmas[k])
            return {state(k): scale, data(k): -float(grid.alphas[k]) * scale}
        if k > last:
            weights = self._rule.extrapolate(k, self.previous_base, last, self._levels)
        else:
            above = min(i for i in self.progress.known if i > k)
            weights = self._rule.interpolate(k, self.progress.known_at(k), above, self._levels)
        return {data(i): weight for i, weight in weights.items()}


def _check_round(r: Round, progress: PlanProgress, mode: Mode, steps: int) -> None:
    """Check a round of a mode, which may be a user's; the error's message names the rule that it breaks."""
    base, last = progress.base, progress.last
    if not base <= r.base <= last + 1:
        raise ValueError(
            f"{mode}: {r} starts at {r.base}, but the run is at {base} and has predictions up to {last}; start from "
            f"{base} to {last + 1}"
        )
    if not r.predict or len(r.predict) > mode.width:
        raise ValueError(f"{mode}: {r} predicts {len(r.predict)} indices; a round predicts 1 to {mode.width}")
    first, end = r.predict[0], r.predict[-1]
    newest = max([last, *(out.predict[-1] for out in progress.in_flight)])
    if mode.gaps:
        if list(r.predict) != sorted(set(r.predict)) or first < r.base or end >= steps:
            raise ValueError(f"{mode}: {r} must predict rising indices, from {r.base} on, to {steps - 1} at most")
    elif r.predict != tuple(range(first, end + 1)) or not r.base <= first <= newest + 1 or end >= steps:
        raise ValueError(
            f"{mode}: {r} must predict indices in a row, starting from {r.base} to {newest + 1}, to {steps - 1} at most"
        )
    if r.previous_base is not None and not progress.previous_base <= r.previous_base <= r.base:
        raise ValueError(
            f"{mode}: {r} looks back on {r.previous_base}; what is kept goes from {progress.previous_base} to {r.base}"
        )
