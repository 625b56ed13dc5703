"""A discrete-event model of the leader's loop and its workers.

It follows the steps of `drp.leader.engine` in the same order: admit runs, assign drafts, refine, receive. The leader is
one thread and does one thing at a time; a worker has at most the policy's `depth` of drafts. Modes and policies are the
same objects as in the engine; only the tensors are missing.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Sequence
from typing import TypeAlias

from drp.leader.engine import RUNS_PER_WORKER
from drp.leader.events import EventKind, Timeline, TraceEvent
from drp.leader.scheduling.policies import Policy
from drp.simulate.costs import SLEEP, Costs
from drp.simulate.devices import SimulatedDevice
from drp.simulate.load import Workload
from drp.simulate.network import Link, Network
from drp.simulate.schedule import Schedule, ScheduledDraft
from drp.simulate.state import Outcome, SimulatedRun, SimulatedWorker

NOTICE = 0.005
"""Seconds until the leader notices that a worker has died."""


def simulate(
    devices: Sequence[SimulatedDevice],
    policy: Policy,
    load: Workload,
    costs: Costs | None = None,
    seed: int = 0,
    staleness: float = 5e-5,
    timeline: Timeline | None = None,
    link: Link | None = None,
) -> Outcome:
    """Simulate the runs of a load.

    Args:
        devices: the simulated devices.
        policy: the policy, which also schedules the load's mode.
        load: the requests.
        costs: the times of everything except the devices; by default 0.
        seed: determines the costs, arrivals and failures that are drawn.
        staleness: replaces the network in a mode with feedback, see `Schedule`.
        timeline: a list to which the runs' events are appended, as by the engine.
        link: the network to the workers if they are on other machines; in addition to the devices' own links.

    Raises ValueError for a mode whose rounds are inconsistent.
    """
    return _Simulation(devices, policy, load, costs or Costs(), seed, staleness, timeline, link or Link()).run()


Event: TypeAlias = "tuple[float, int, SimulatedWorker, int, ScheduledDraft | None, float, float, bool]"
"""Time, order, worker, its generation, draft (None for a failure), seconds and begin of the evaluation, and whether the
leader can read the prediction by then; otherwise it only reaches the leader's machine."""


class _Simulation:
    """The state of one simulation.

    now                      the leader's time in seconds
    arrivals, submitted      times of requests to come; the number of requests so far
    runs, done, numbers      current runs; finished runs; the numbers of future runs
    worker_slots             the workers and their drafts
    network                  the way of drafts and predictions to and from the workers
    events, order            a heap of predictions and failures to come; a counter that breaks ties in it
    draws                    the random number generator
    hedged, lost             counts for the outcome
    """

    def __init__(
        self,
        devices: Sequence[SimulatedDevice],
        policy: Policy,
        load: Workload,
        costs: Costs,
        seed: int,
        staleness: float,
        timeline: Timeline | None,
        link: Link,
    ) -> None:
        self.timeline = timeline
        self.network = Network(link)
        self.draws = random.Random(seed)  # noqa: S311  # times, not secrets
        self.policy, self.load, self.costs, self.staleness = policy, load, costs, staleness
        self.mode = policy.schedule(load.mode)
        self.worker_slots = [SimulatedWorker(number, device) for number, device in enumerate(devices)]
        for worker_slot in self.worker_slots:
            worker_slot.fails_at = self._failure(worker_slot, 0.0)
        self.now = 0.0
        self.arrivals = deque(load.arrivals(self.draws))
        self.numbers = itertools.count(load.first)
        self.runs: list[SimulatedRun] = []
        self.done: list[SimulatedRun] = []
        self.events: list[Event] = []
        self.order = itertools.count()
        self.submitted = len(self.arrivals)
        self.hedged = self.lost = 0

    def run(self) -> Outcome:
        """Execute the loop until all runs are done."""
        while self.arrivals or self.runs:
            self._admit()
            self._dispatch()
            self._refine()
            self._receive()
        first = min(run.arrived for run in self.done)
        last = max(run.ended for run in self.done)
        computed = sum(worker_slot.computed for worker_slot in self.worker_slots)
        return Outcome(tuple(self.done), len(self.worker_slots), last - first, computed, self.hedged, self.lost)

    def _some(self, samples: Sequence[float]) -> float:
        return samples[0] if len(samples) == 1 else self.draws.choice(samples)

    def _failure(self, worker_slot: SimulatedWorker, now: float) -> float:
        mtbf = worker_slot.device.mtbf
        return now + self.draws.expovariate(1 / mtbf) if mtbf else float("inf")

    def _admit(self) -> None:
        while (
            self.arrivals and self.arrivals[0] <= self.now and len(self.runs) < RUNS_PER_WORKER * len(self.worker_slots)
        ):
            schedule = Schedule(self.mode, self.load.steps, self.staleness)
            run = SimulatedRun(next(self.numbers), self.arrivals.popleft(), schedule, self.load.steps, began=self.now)
            self._mark("begin", run)
            self.runs.append(run)
            since, drafts = self.now, schedule.schedule_drafts()
            self.now += self._some(self.costs.start)
            self._formed(run, drafts, since)

    def _formed(self, run: SimulatedRun, drafts: list[ScheduledDraft] | None, since: float) -> None:
        if drafts is None:
            self.now += self._some(self.costs.end)
            self._mark("end", run, since=since)
            run.ended = self.now
            self.runs.remove(run)
            self.done.append(run)
            if not self.load.rate and self.submitted < self.load.count:
                self.arrivals.append(self.now)
                self.submitted += 1
            return
        run.needs_refine = run.schedule.states
        self._mark("scheduled", run, since=since, steps=tuple(draft.step for draft in drafts))
        run.waiting.extend(drafts)
        run.outstanding.update(drafts)

    def _dispatch(self) -> None:
        """Assign drafts as the engine does: one per worker, up to `depth` if there is only one run; then hedge."""
        runs = [run for run in self.runs if run.outstanding]
        ready = [worker_slot for worker_slot in self.worker_slots if worker_slot.ready]
        sent = 0
        for depth in range(1, (self.policy.depth if len(runs) == 1 else 1) + 1):
            for place, worker_slot in enumerate(ready):
                while len(worker_slot.drafts) < depth:
                    run = self.policy.choose(place, len(ready), runs)
                    if run is None:
                        self._hedge(ready)
                        return
                    self._assign(worker_slot, run, run.waiting.popleft(), sent)
                    sent += 1

    def _assign(self, worker_slot: SimulatedWorker, run: SimulatedRun, draft: ScheduledDraft, sent: int) -> None:
        since = self.now
        self.now += self._some(self.costs.send_more if sent else self.costs.send_first)
        self._mark("sent", run, draft.step, worker_slot.number, since=since)
        arrived = self.network.deliver(worker_slot.number, self.now)
        if not worker_slot.drafts:
            worker_slot.since = self.now
            began = arrived + self._some(self.costs.down[min(sent, len(self.costs.down) - 1)])
        else:
            began = max(arrived, worker_slot.free_at) + self._some(self.costs.following)
        worker_slot.drafts.append((run, draft))
        link = worker_slot.device.link
        began = max(began, worker_slot.free_at) + link
        seconds = worker_slot.device.seconds(run.number, draft.step, self.draws, draft.width)
        seconds = max(0.0, seconds + self._some(self.costs.late))
        worker_slot.free_at = began + seconds + link
        if worker_slot.free_at > worker_slot.fails_at:
            if worker_slot.generation >= 0:  # Schedule the failure once; all drafts of the worker are lost together.
                worker_slot.computed += max(0.0, worker_slot.fails_at - began)
                self._event(worker_slot.fails_at + NOTICE, worker_slot, None)
                worker_slot.generation = -worker_slot.generation - 1
            return
        worker_slot.computed += seconds
        there = self.network.leave(worker_slot.number, worker_slot.free_at)
        self._event(there, worker_slot, draft, seconds, began)

    def _event(
        self,
        at: float,
        worker_slot: SimulatedWorker,
        draft: ScheduledDraft | None,
        seconds: float = 0.0,
        began: float = 0.0,
    ) -> None:
        entry = (at, next(self.order), worker_slot, abs(worker_slot.generation), draft, seconds, began, draft is None)
        heapq.heappush(self.events, entry)

    def _next_event(self) -> float:
        """Return when the next event is due, infinity if there is none; predictions are received in their order."""
        while self.events and not self.events[0][-1]:
            at, order, worker_slot, generation, draft, seconds, began, _ = self.events[0]
            at = self.network.receive(worker_slot.number, at)
            heapq.heapreplace(self.events, (at, order, worker_slot, generation, draft, seconds, began, True))
        return self.events[0][0] if self.events else float("inf")

    def _mark(
        self,
        what: EventKind,
        run: SimulatedRun,
        step: int = 0,
        worker: int = 0,
        seconds: float = 0.0,
        since: float = 0.0,
        times: tuple[float, ...] = (),
        steps: tuple[int, ...] = (),
    ) -> None:
        if self.timeline is not None:
            ns, began = round(self.now * 1e9) + 1, round(since * 1e9) + 1
            self.timeline.append(TraceEvent(what, ns, run.number, step, worker, seconds, began, times, steps))

    def _hedge(self, ready: Sequence[SimulatedWorker]) -> None:
        if not self.policy.hedge:
            return
        idle = [worker_slot for worker_slot in ready if not worker_slot.drafts]
        for worker_slot in ready if idle else ():
            if worker_slot.drafts and self.now >= self._late(worker_slot):
                for run, draft in list(worker_slot.drafts):
                    if idle and draft in run.outstanding and self._copies(draft) == 1:
                        self.hedged += 1
                        self._mark("hedged", run, draft.step, worker_slot.number)
                        self._assign(idle.pop(), run, draft, 0)

    def _late(self, worker_slot: SimulatedWorker) -> float:
        usual = worker_slot.drafts[0][0].median_latency
        return worker_slot.since + self.policy.hedge * usual if self.policy.hedge and usual else float("inf")

    def _copies(self, draft: ScheduledDraft) -> int:
        return sum(other is draft for worker_slot in self.worker_slots for _, other in worker_slot.drafts)

    def _refine(self) -> None:
        to_refine = [run for run in self.runs if run.needs_refine is not None]
        if to_refine:
            self.now = min(self.now + self.costs.head_start, max(self.now, self._next_event()))
        for run in to_refine:
            since = self.now
            if run.needs_refine:
                self.now += self.costs.refine.draw(run.needs_refine, self.draws)
                self._mark("refined", run, run.schedule.base, since=since)
            run.needs_refine = None

    def _receive(self) -> None:
        """Sleep until an event is due; handle events until drafts can be assigned."""
        answer = self._next_event()
        timer = self._timer()
        if min(answer, timer) == float("inf"):
            if not self.runs and not self.arrivals:
                return
            raise RuntimeError("no event is left, but runs are: the mode or the policy leaves drafts waiting")
        first = answer > self.now
        if first and answer <= timer:
            self.now = answer + self._some(self.costs.wake_long if answer - self.now > SLEEP else self.costs.wake_short)
        else:
            self.now = max(self.now, min(answer, timer))
        while self._next_event() <= self.now:
            self._handle_event(first)
            first = False
            if any(run.waiting for run in self.runs):
                break

    def _timer(self) -> float:
        """Return the time of the next arrival or hedge, infinity if there is none."""
        times = []
        if self.arrivals and len(self.runs) < RUNS_PER_WORKER * len(self.worker_slots):
            times.append(self.arrivals[0])
        busy = [worker_slot for worker_slot in self.worker_slots if worker_slot.drafts]
        if self.policy.hedge and len(busy) < len(self.worker_slots):
            late = (self._late(s) for s in busy if any(self._copies(draft) == 1 for _, draft in s.drafts))
            times += [at for at in late if at > self.now]
        return min(times, default=float("inf"))

    def _handle_event(self, first: bool) -> None:
        at, _, worker_slot, generation, draft, seconds, began, _ = heapq.heappop(self.events)
        if draft is None:
            self._on_loss(worker_slot, at)
            return
        if generation != abs(worker_slot.generation) or not worker_slot.drafts:
            return
        run, expected = worker_slot.drafts.popleft()
        assert expected is draft
        worker_slot.since = since = self.now
        needed = draft in run.outstanding  # Otherwise the other copy's prediction was used.
        times = (began, began, began + seconds, began + seconds)
        self._mark("predicted" if needed else "late", run, draft.step, worker_slot.number, seconds, times=times)
        if not needed:
            return
        self.now += self._some(self.costs.receive_first if first else self.costs.receive_more)
        self._mark("accumulated", run, draft.step, worker_slot.number, since=since)
        run.outstanding.remove(draft)
        run.recent.append(seconds)
        run.evaluations += 1
        run.schedule.arrive(draft)
        if run.schedule.ready:
            since, drafts = self.now, run.schedule.schedule_drafts()
            if drafts is not None:
                self.now += self.costs.form.draw(len(drafts), self.draws)
            self._formed(run, drafts, since)

    def _on_loss(self, worker_slot: SimulatedWorker, at: float) -> None:
        """Handle the death of a worker, or the start of its replacement."""
        if not worker_slot.ready:
            worker_slot.ready = True
            worker_slot.free_at = self.now
            worker_slot.fails_at = self._failure(worker_slot, self.now)
            return
        self.lost += 1
        drafts, worker_slot.drafts = worker_slot.drafts, deque()
        worker_slot.ready, worker_slot.generation = False, abs(worker_slot.generation) + 1
        for run, draft in reversed(drafts):
            self._mark("lost", run, draft.step, worker_slot.number)
            if draft in run.outstanding and not self._copies(draft):
                run.waiting.appendleft(draft)
        self._event(at + worker_slot.device.restart, worker_slot, None)
