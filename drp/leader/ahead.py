"""Ahead: runs whose drafts are answered before a device has evaluated them: `GpuOptions(ordering="device")`.

A prediction is folded in as soon as the worker has queued it, or, if it is on cores, as soon as it is asked for: the
run's stream waits for the worker's, reads the stamp behind the prediction, and only then the prediction itself. The
leader looks at what was read when it comes to it. Until then the draft is still the worker's, with its row and its
deadline, and nothing that was made of it leaves the leader, neither a callback's state nor samples. If a worker is lost
with answers that were not stamped, the run begins again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drp.leader.active import ActiveRun, Pending, Sent
from drp.leader.clock import Clock
from drp.leader.ground import Ground
from drp.leader.request import Job, Request
from drp.protocol.cuda import LINES, WorkersNumber
from drp.protocol.memory import aligned
from drp.protocol.messages import Bind, Order
from drp.protocol.order import ALL, LINE, RAISED, STAMP, UNREAD, UNWANTED, WorkersRecord, verdict_of, word
from drp.sampling.result import Result
from drp.sampling.run import Run, Task, residual

LONG, MANY, LARGE = 0.08, 16, 1 << 24
"""Seconds, drafts and bytes that workers have at most beyond two rounds: what another run has for them comes behind."""


@dataclass(eq=False)
class Answer:
    """An answer whose stamps are being read, a list of STAMP numbers each; it `counts` if it was folded in."""

    sent: Sent
    worker: int
    read: Callable[[], list[list[int]]]
    counts: bool
    since: float

    @property
    def verdict(self) -> int | None:
        """What the stamps say, the worst of a batch; None if one is not the draft's, UNREAD if one was not read yet."""
        words = [stamp[0] for stamp in self.read()]
        if UNREAD in words:
            return UNREAD
        found = [verdict_of(each, self.sent.sequence) for each in words]
        known = [verdict for verdict in found if verdict is not None]
        return max(known) if len(known) == len(found) else None

    @property
    def seconds(self) -> float:
        """How long the evaluation took, 0 if the device does not tell."""
        return sum(stamp[1] for stamp in self.read()) / 1e9

    @property
    def ended(self) -> float:
        """When the evaluation ended, in seconds of perf_counter, 0 if the device does not tell."""
        return max(stamp[2] for stamp in self.read()) / 1e9

    def named(self, verdict: int) -> int:
        """Return the index of the first draft of the batch whose stamp says so."""
        words = [stamp[0] for stamp in self.read()]
        return self.sent.tasks[words.index(word(self.sent.sequence, verdict))].index


@dataclass(frozen=True)
class Step:
    """A state [B * D] kept for the caller, the draft at its index, both if asked for; behind so many answers."""

    k: int
    state: Tensor | None
    given: Tensor | None
    needs: int
    mark: Any


class AheadRun(ActiveRun):
    """A run on a stream of its own, so that no run waits for another's workers."""

    def __init__(
        self,
        number: int,
        job: Job,
        request: Request,
        pending: Pending,
        spare: int,
        batch: int,
        ground: Ground,
        places: int,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._ground, self.stream, self._places = ground, ground.stream(), places
        self._workers: dict[int, WorkersRecord] = {}
        """What each records."""
        self._out: dict[int, None] = {}
        """Sequence numbers of the drafts that workers have, in order."""
        self._answers: deque[Answer] = deque()
        """In the order in which they were folded in, which is that in which their stamps are read."""
        self._steps: deque[Step] = deque()
        self._residuals: dict[int, float] = {}
        self._rounds_of: dict[int, int] = {}
        """By index, which round the draft there was formed with."""
        self._reserved: dict[int, int] = {}
        """By slot, the row that the draft in it will be given."""
        self._formed = self._folded = self._verified = self._recorded = 0
        self._exhausted = False
        self._progress = clock.now()
        self._few, self._filling, self._begun = MANY, False, False
        self.begins = 0
        """How many rounds have begun: their drafts are written."""
        few = min(spare, 2 * -(-job.mode.width // batch) * batch)
        self._bursts = max(1, min(MANY // few, LARGE // (few * job.start.nbytes)))
        """How many times the drafts of two rounds workers may have, where evaluations are short."""
        spare = max(spare, self._bursts * few) + job.mode.width  # A round is not divided.
        rows = job.slots + spare
        lines = aligned(rows * STAMP * 8)
        try:
            with self.stream.current():
                super().__init__(number, job, request, pending, spare, batch, ground.take, lines + (1 + places) * LINE)
        except BaseException:
            self.stream.close()
            raise
        stamps = self.arena.memory.tensor(self.arena.end, (rows, STAMP), torch.int64)
        self._stamps: Tensor | memoryview = stamps if stamps.is_cuda else stamps.numpy().data
        self._lines = self.arena.end + lines
        self.arena.memory.tensor(self._lines, (1 + places, LINE), torch.uint8).zero_()
        self._own = ground.own(self.arena.memory, self._lines, self.stream)

    def _make_run(self) -> Run:
        job = replace(self.job, watch=False)  # Residuals are computed when the states are looked at.
        return job.run(self.arena.drafts, self.arena.predictions, self.stream)

    # What the engine calls, in the order of a draft's life.

    def bind(self, worker: int) -> Bind:
        """Join this run's stream to a worker's; return what it is told."""
        ground, place = self._ground, self._lines + (1 + worker) * LINE
        record = self._workers[worker] = ground.workers(worker, self.arena.memory, place, self.stream)
        bell = ground.bell.end if ground.bell is not None else None
        order = Order(
            stamps=self.arena.end,
            lines=self._lines,
            workers=self._places,
            own=worker,
            heard=ground.hears,
            awake=ground.awake,
            thread=ground.thread,
            bell=bell,
        )
        if isinstance(record, WorkersNumber):
            order = replace(order, numbers=record.numbers.handle, lines=0, workers=LINES, own=record.line)
        return replace(self.arena.bind, order=order)

    def dispatch(self, worker: int) -> tuple[int, int]:
        """Return the numbers of the next draft that a worker is given, and of the last record."""
        sequence = self._ground.number()
        self._out[sequence] = None
        return sequence, self._recorded

    def given(self, worker: int, sent: Sent) -> None:
        """Take it as answered, if nothing will be heard of it."""
        if not self._ground.hears:
            self.answered(worker, sent, counts=True)

    def _add(self, tasks: Sequence[Task]) -> None:
        super()._add(tasks)
        self._formed += 1
        for task in tasks:
            self._rounds_of[task.index] = self._formed
            # Now, and not when it is sent: by then there may be waits in between, for others that were formed with it.
            self._reserved[task.slot] = super().free_row(task.slot)

    def room(self, out: int, few: int) -> int:
        """Return how many drafts, or batches of them, to give to workers that have `out` of them.

        They have `few`, and not more than two rounds'. Where evaluations are short they are given several times that,
        in one go when no more than that is left, or half of it while this thread has a core: code that has just run
        takes a fraction of the time, and so do messages that are sent together.
        """
        self._begun = False
        self._few = min(few, 2 * -(-self.job.mode.width // self._batch))
        usual = self.usual if not self._ground.hears else None
        most = self._few * int(max(1, min(self._bursts, LONG / (2 * usual)))) if usual else self._few
        least = max(self._few, most // 2) if self.stream.has_core else self._few
        self._filling = out <= least or (self._filling and out < most)
        return most - out if self._filling else 0

    def belongs(self, tasks: Sequence[Task], last: Sequence[Task], workers: int) -> bool:
        """Whether drafts go out with the last ones: of the same round, if that has no more than one for each worker."""
        mine = self._rounds_of[tasks[0].index]
        return self._rounds_of[last[0].index] == mine and self.job.mode.width <= workers * self._batch

    def beside(self, tasks: Sequence[Task], drafts: Sequence[Sent]) -> int:
        """Count the drafts that a device would evaluate first: formed with these, if rounds wait for each other."""
        mine = self._rounds_of[tasks[0].index]
        return sum(
            self.job.mode.lags or sent.run is not self or self._rounds_of.get(sent.tasks[0].index) == mine
            for sent in drafts
        )

    def free_row(self, slot: int) -> int:
        """Return a row for a draft's prediction, which nobody reads once what was recorded is done."""
        row = self._reserved.pop(slot, None)
        if row is None:  # It is given again, after a loss.
            row = super().free_row(slot)
            with self.stream.current():
                self._recorded = self._own.record()
        return row

    def rows_in_use(self) -> set[int]:
        """Return the rows that the arithmetic may still read, and those that were promised."""
        return super().rows_in_use() | set(self._reserved.values())

    def answered(self, worker: int, sent: Sent, counts: bool) -> None:
        """Queue the wait for a worker's stream, the reading of the stamps, and, if it counts, the arithmetic."""
        sent.answered = True
        with self.stream.current():
            self._workers[worker].wait()
            self._answers.append(Answer(sent, worker, self._read(sent.rows), counts, self._clock.now()))
            for task, row in zip(sent.tasks, sent.rows, strict=True) if counts else ():
                del self.missing[task.slot]
                self.run.fold(task.slot, row)
        self._folded += counts

    def _read(self, rows: Sequence[int]) -> Callable[[], list[list[int]]]:
        """Queue the reading of stamps; return what tells them."""
        if isinstance(self._stamps, Tensor):
            pinned = torch.full((len(rows), STAMP), UNREAD, dtype=torch.int64, pin_memory=True)
            for place, row in zip(pinned, rows, strict=True):
                self.stream.put(partial(place.copy_, self._stamps[row], non_blocking=True))
            return pinned.tolist
        seen = [[UNREAD] * STAMP for _ in rows]
        self.stream.put(partial(_copy_stamps, self._stamps, rows, seen))
        return lambda: seen

    def form(self) -> bool | None:
        """Form all drafts whose predictions are queued; at the end wait, with None, until all stamps were seen."""
        with self.stream.current():
            if super().form():
                self._recorded = self._own.record()  # What is sent from now on waits for what was queued so far.
                self.stream.put(self._note_begin)
                return True
        self._exhausted = True
        return None if self._answers else False

    @property
    def ready(self) -> bool:
        """Whether there are drafts to form, or nothing is left. Feedback is made of numbers, which must be there.

        Until the first device is done there are only drafts of three rounds: workers open the memory meanwhile.
        """
        waits = self._answers and (self._exhausted or self.job.mode.feedback)
        opening = self._formed > 2 and self.begins == 1
        return self.run.ready and not (opening or waits)

    def go(self, alone: bool) -> float | None:
        """Do what can be done of what was queued, if that takes this thread; return when to go on.

        `alone` says that workers have no other run.
        """
        with self.stream.current():
            return self.stream.go(alone)

    @property
    def holds(self) -> bool:
        """Whether others are to be left alone: a worker opens the memory, and its device waits for that."""
        return bool(self.unbound)

    @property
    def is_low(self) -> bool:
        """Whether workers have no more than a round and a half beyond the one at which they are."""
        return self.stream.waits <= self._few + self._few // 4

    @property
    def at_work(self) -> bool:
        """Whether workers have the next round too. If none has just begun, one is about to end: that comes first.

        Where they lend their cores, there is time for anything else when they do.
        """
        least = self._few // 2 + 1 if self.stream.lent or not self._begun else self._few
        wanted = self._begun and self.wants_states
        ready = self.ready and not self.stream.lent  # Then there will be a core for that.
        return not (ready or wanted) and self.stream.waits >= max(1, least)

    def _note_begin(self) -> None:
        self._begun = True
        self.begins += 1

    @property
    def looking(self) -> bool:
        """Whether there are stamps to be seen, or states to be handed out."""
        return bool(self._answers) or self.behind

    @property
    def has_news(self) -> bool:
        """Whether there are stamps to be seen that were read, so that there is more to be done than to wait."""
        return bool(self._answers) and self._answers[0].verdict not in (UNREAD, RAISED)

    def looked(self) -> Iterator[tuple[Answer, int | None]]:
        """Yield answers whose stamps were read, in their order, with the verdict; None is for one that is not proven.

        One whose evaluation raised is left: a Fault follows. So is one that is not proven, to be lost with its worker.
        """
        while self._answers:
            answer = self._answers[0]
            verdict = answer.verdict
            if verdict in (UNREAD, RAISED):
                return
            if verdict == UNWANTED and answer.counts:
                verdict = None  # It is.
            if verdict is not None:
                self._verify(self._answers.popleft())
            yield answer, verdict
            if verdict is None:
                return

    def _verify(self, answer: Answer) -> None:
        now, seconds = self._clock.now(), answer.seconds
        self._slowest = max(self._slowest, seconds or now - max(answer.since, self._progress))
        if seconds:
            self._recent.append(seconds)
        self._progress = now
        self.served.add(answer.worker)
        del self._out[answer.sent.sequence]
        if answer.counts:
            self._verified += 1
            self.device_seconds += seconds
            self.evaluations += len(answer.sent.tasks)
            for task in answer.sent.tasks:
                self.used_up.pop(task.index, None)
            self.behind = self.behind or bool(self._steps)

    def withdraw(self, sent: Sent) -> bool:
        """Forget a draft that cannot be evaluated; return whether its prediction was folded in."""
        self._out.pop(sent.sequence, None)
        found = [answer for answer in self._answers if answer.sent is sent]
        for answer in found:
            self._answers.remove(answer)
        return any(answer.counts for answer in found)

    def lose_answers(self, worker: int, drafts: tuple[Sent, ...]) -> bool:
        """Go on without a worker and the drafts that it had; return whether one was folded in that was not proven."""
        self._progress = self._clock.now()  # Others may have waited for it, and have their time from now on.
        record = self._workers.pop(worker, None)
        if record is not None:
            record.release()
        folded = [self.withdraw(sent) for sent in drafts if sent.run is self]
        return any(folded)

    def drop(self) -> None:
        """Have workers not begin what they were given."""
        self._own.drop(ALL)
        for answer in self._answers:
            answer.counts = False

    def replay(self) -> None:
        """Begin again. Callbacks that were called are not called again; what is still out is nobody's."""
        self.waiting.clear()
        self.missing.clear()
        self._reserved.clear()
        self._steps.clear()
        self._own.drop(self._recorded + 1)
        for answer in self._answers:
            answer.counts = False
        self._folded = self._verified = 0
        self._exhausted = False
        self.evaluations, self.device_seconds = 0, 0.0
        with self.stream.current():
            self._begin()

    def due(self, sequence: int, since: float) -> float:
        """Return since when a worker owes a draft: only the one that the run's stream waits for, or comes to next."""
        first = self._answers[0].sent.sequence if self._answers else next(iter(self._out))
        return max(since, self._progress) if sequence == first else math.inf

    def refine(self) -> None:
        """Queue what nobody waits for, and hand out the states that are proven."""
        with self.stream.current():
            self.run.refine(self._keep, between=self.wants_states)
        if self._exhausted and not self._answers:
            self.stream.settle()  # Nothing in it waits for a worker any more.
        self.pending.rounds = max(self.pending.rounds, self.run.rounds_done)
        while self._steps and self._steps[0].needs <= self._verified:
            if self._steps[0].mark is not None and not self.stream.passed(self._steps[0].mark):
                break
            self._hand_out(self._steps.popleft())
        self.run.residuals.update(self._residuals)
        self.behind = bool(self._steps) and self._steps[0].needs <= self._verified

    @property
    def wants_states(self) -> bool:
        """Whether somebody is given the states between."""
        return self._callback is not None or self.job.watch

    def _keep(self, k: int, x: Tensor) -> None:
        """Note a state that is being computed; the next round may be computed in its place, so keep it if need be."""
        state = given = mark = None
        if k > self.steps_done and self.wants_states:
            draft = self.run.given(k) if self.job.watch else None
            state, given = self._copy(x.reshape(-1)), None if draft is None else self._copy(draft)
            mark = self.stream.mark()
        self._steps.append(Step(k, state, given, self._folded, mark))

    def _copy(self, x: Tensor) -> Tensor:
        kept = torch.empty_like(x)
        self.stream.put(partial(kept.copy_, x))
        return kept

    def _hand_out(self, step: Step) -> None:
        if step.k <= self.steps_done:
            return
        self.steps_done = step.k
        if step.state is None:
            return
        with self.stream.aside():  # The run's own stream may be waiting for workers, for as long as they take.
            if step.state.is_cuda:
                step.state.record_stream(torch.cuda.current_stream())
            if step.given is not None:
                self._residuals[step.k] = residual(step.state, step.given, len(self.job.start))
            if self._callback is not None:
                call = self._called if self.watch else self._callback
                call(step.k, step.state.view(self.job.start.shape))

    def _result(self, devices: tuple[str, ...]) -> Result:
        with self.stream.aside():
            return super()._result(devices)

    def release(self) -> None:
        """Let go of the memory; whoever has it next comes after what is still queued."""
        with self.stream.current():
            self.arena.memory.written()
        self.stream.close()
        super().release()


def _copy_stamps(stamps: memoryview, rows: Sequence[int], seen: list[list[int]]) -> None:
    """Read stamps where they lie, int64 [rows, STAMP], one for one."""
    for place, row in enumerate(rows):
        seen[place] = [stamps[row, number] for number in range(STAMP)]
