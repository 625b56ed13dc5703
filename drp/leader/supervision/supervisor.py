"""The supervisor: one worker slot for each device, and a new worker when one is lost.

It does not know runs. `Batch`, the type of what a worker is given to evaluate, is a type variable here: the leader's
other parts fill the slots, and get the batches of a lost worker back in `WorkerLoss`.
"""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from drp.errors import WorkerError
from drp.leader.clock import Clock
from drp.leader.devices import Device
from drp.leader.memory.placement import MemoryPlacement
from drp.leader.supervision.startup import WorkerStartup
from drp.leader.supervision.worker import Encoded, WorkerHandle
from drp.leader.supervision.worker_pool import SHUTDOWN_TIMEOUT, WorkerPool, failure
from drp.protocol.messages import Bind, ToLeader, ToWorker, WorkerFailed

HEALTH_CHECK_INTERVAL = 1.0
"""Seconds between two checks of the heartbeats of idle workers."""
MAX_MISSED_HEARTBEATS = 5
"""Consecutive checks without a new heartbeat after which an idle worker counts as lost."""
BACKOFF = 0.5
"""Seconds before a lost worker is replaced. It doubles with each loss in the slot until a draft is finished."""
MAX_BACKOFF = {"serving": 10.0, "down": 2.0}
"""The maximum of the backoff, by whether another worker is ready."""
DRAFT_RETRY_COST = {"outside": 1 / 4, "own": 1 / 3}
"""The share of a draft's retry budget that the loss of its worker uses. A draft is given up once the budget is used:
after four losses by a signal from outside ("outside"), or three by a crash, a hang or an exit ("own")."""
SLOT_RETRY_COST = {"shortage": 1 / 60, "outside": 0.0, "own": 1 / 8}
"""The share of a worker slot's retry budget that a loss uses. The budget is restored when a worker finishes a draft.
"shortage" means that no worker can be started because this process or the machine has no memory, descriptors or
processes left; starting is tried for at least two minutes. A signal from outside says nothing about the worker, and nor
does it that none has dialed in from another machine, so they use no budget: the slot is given up only if no worker at
all has been ready for `start_timeout`."""
CRASH_SIGNALS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)

log = logging.getLogger(__name__)
SlotState = Literal["starting", "ready", "restarting", "lost"]
LossCause = Literal["outside", "own"]
Reason = Literal["shortage", "outside", "own"]
Batch = TypeVar("Batch")


@dataclass
class WorkerSlot(Generic[Batch]):
    """The slot of one device: its worker, and the drafts that the worker has.

        state        meaning                          `worker`  next state
        restarting   a worker is to be started        None      starting, at the time `since`
        starting     the worker loads the model       set       ready; restarting or lost if it fails, or at `since`
        ready        the worker evaluates drafts      set       restarting or lost, if the worker is lost
        lost         the slot is given up             None      none

    The state after a loss depends on its reason:

        reason    the worker                          next state
        own       failed, crashed, exited or hung     restarting while there is retry budget, else lost
        shortage  could not be started                restarting while there is retry budget, else lost
        outside   was ended by a signal from outside, restarting; lost if no worker of the leader was ready for
                  or has not dialed in                `start_timeout`, counted from the last one that was
    """

    number: int
    device: Device
    worker: WorkerHandle | None = None
    state: SlotState = "restarting"
    generation: int = 0
    drafts: deque[Batch] = field(default_factory=deque)
    outbox: list[Encoded] = field(default_factory=list)
    """Encoded messages to be sent with the next flush."""
    binds: dict[int, Bind] = field(default_factory=dict)
    """By run number, the Bind that describes the run's memory to the worker."""
    retained_bind: Bind | None = None
    """The Bind of the finished run whose memory the worker keeps mapped, for a `Rebind`."""
    since: float = 0.0
    """When the worker became ready, finished its last draft, or was sent one while idle; in the states starting and
    restarting, the time at which the state ends."""
    retry_budget_used: float = 0.0
    """The share of the retry budget used since a worker last finished a draft."""
    restarts: int = 0
    """The number of restarts since a worker last finished a draft."""
    last_failure: str = ""
    """How the slot's last worker ended, and that no other one has come since."""
    last_end: str = ""
    """The same, of the last worker that had a process."""
    _last_heartbeat: int = -1
    _missed_heartbeats: int = 0

    def check_heartbeat(self) -> bool:
        """Count missed heartbeats of an idle worker; return False if there are too many.

        A suspended system does not count as missed heartbeats.
        """
        assert self.worker is not None
        heartbeat = self.worker.heartbeat
        self._missed_heartbeats = 0 if self.drafts or heartbeat != self._last_heartbeat else self._missed_heartbeats + 1
        self._last_heartbeat = heartbeat
        return self._missed_heartbeats < MAX_MISSED_HEARTBEATS


@dataclass(frozen=True)
class WorkerLoss(Generic[Batch]):
    """The loss of a worker: its slot, the reason, the cause for the retry budgets, and the drafts that it had."""

    worker_slot: WorkerSlot[Batch]
    reason: str
    cause: LossCause
    drafts: tuple[Batch, ...]


class Supervisor(Generic[Batch]):
    """The worker slots of one leader; starts, checks and replaces their workers."""

    def __init__(
        self,
        pool: WorkerPool,
        model: str,
        devices: Sequence[Device],
        start_timeout: float,
        placement: MemoryPlacement,
        clock: Clock,
    ) -> None:
        self.clock, self._placement = clock, placement
        self.worker_slots: list[WorkerSlot[Batch]] = [
            WorkerSlot(number, device) for number, device in enumerate(devices)
        ]
        self._pool, self._start_timeout = pool, start_timeout
        self.startup = WorkerStartup(pool, model, devices, placement)
        """The start-up handshake, which also knows the model's specification."""
        self._next_health_check = clock.now() + HEALTH_CHECK_INTERVAL
        self._down_since = clock.now()  # the time at which the last ready worker was lost, while none is ready
        self.ready: tuple[WorkerSlot[Batch], ...] = ()
        """WorkerHandle slots whose workers accept drafts."""

    def _set_state(self, worker_slot: WorkerSlot[Batch], state: SlotState) -> None:
        was_serving, worker_slot.state = bool(self.ready), state
        self.ready = tuple(worker_slot for worker_slot in self.worker_slots if worker_slot.state == "ready")
        if was_serving and not self.ready:
            self._down_since = self.clock.now()

    @property
    def device_names(self) -> tuple[str, ...]:
        return tuple(worker_slot.device.name for worker_slot in self.worker_slots)

    def enqueue(self, worker_slot: WorkerSlot[Batch], message: ToWorker) -> None:
        """Queue a message for a worker, to be sent with the next `flush`; it is dropped if there is no worker."""
        if worker_slot.worker is not None:
            worker_slot.outbox.append(worker_slot.worker.encode(message))

    def flush(self, worker_slots: Iterable[WorkerSlot[Batch]]) -> None:
        """Send the queued messages, those of a worker together. A worker that has exited is noticed by `poll`."""
        for worker_slot in worker_slots:
            if worker_slot.worker is not None and worker_slot.outbox:
                worker_slot.worker.send(*worker_slot.outbox)
                worker_slot.outbox.clear()

    def start_worker(self, worker_slot: WorkerSlot[Batch]) -> None:
        """Start a new worker in a slot; raise OSError or MemoryError if the machine or this process lacks resources."""
        worker_slot.since = self.clock.now() + self._start_timeout
        worker_slot.worker = self._pool.spawn(worker_slot.number, worker_slot.generation, worker_slot.device)
        worker_slot.generation += 1
        self._set_state(worker_slot, "starting")
        self.startup.add_worker(worker_slot.worker)

    def on_message(self, worker_slot: WorkerSlot[Batch], message: ToLeader | None) -> WorkerLoss[Batch] | None:
        """Handle a message of a starting worker, or the failure or exit (None) of any worker."""
        worker = worker_slot.worker
        assert worker is not None
        if message is None:
            return self.mark_dead(worker_slot, "")
        if isinstance(message, WorkerFailed):
            return self.mark_dead(worker_slot, failure(worker, message))
        try:
            if self.startup.on_message(worker, message):
                worker_slot.since, worker_slot.device = self.clock.now(), worker.device
                self._set_state(worker_slot, "ready")
        except (MemoryError, OSError) as error:
            return self.mark_dead(worker_slot, f"not enough memory or descriptors for {worker}: {error}", "shortage")
        except RuntimeError as error:  # WorkerError, and what CUDA and torch say
            return self.mark_dead(worker_slot, str(error))
        return None

    def mark_dead(self, worker_slot: WorkerSlot[Batch], why: str, reason: Reason | None = None) -> WorkerLoss[Batch]:
        """Remove a worker, killing it if it still runs, and schedule its replacement.

        Args:
            worker_slot: the slot of the worker.
            why: why the worker is lost; empty if its process ended, which is then described.
            reason: the cause for the slot's retry budget; by default it follows from how the process ended.
        """
        worker = worker_slot.worker
        assert worker is not None
        name, stopped = str(worker), worker.is_stopped
        how, code = worker.retire(why)
        self.startup.remove_worker(worker)  # After the process has ended: another worker may reuse its memory.
        outside = stopped or (not why and code is not None and code < 0 and -code not in CRASH_SIGNALS)
        why += "; it was stopped" if stopped else ""
        worker_slot.last_failure = why or f"{name} {how}"
        if worker.pid is not None:
            worker_slot.last_end = worker_slot.last_failure
        elif worker_slot.last_end:
            worker_slot.last_failure = f"{worker_slot.last_end}; {worker_slot.last_failure}"
        drafts = tuple(worker_slot.drafts)
        worker_slot.drafts.clear()
        worker_slot.outbox.clear()
        worker_slot.binds.clear()
        worker_slot.retained_bind = None
        worker_slot.worker = None
        fault: LossCause = "outside" if outside else "own"
        self._schedule_restart(worker_slot, reason or fault)
        log.warning("lost: %s", worker_slot.last_failure)
        return WorkerLoss(worker_slot, worker_slot.last_failure, fault, drafts)

    def check_health(self) -> list[WorkerLoss[Batch]]:
        """Start replacements that are due; return the workers lost to a start timeout or to missed heartbeats."""
        now, losses = self.clock.now(), []
        for worker_slot in self.worker_slots:
            if worker_slot.state == "restarting" and worker_slot.since <= now:
                try:
                    self.start_worker(worker_slot)
                except (OSError, MemoryError) as error:
                    worker_slot.last_failure = f"{worker_slot.device.name}: no process can be started: {error}"
                    log.warning("%s", worker_slot.last_failure)
                    self._placement.free_unused()
                    self._schedule_restart(worker_slot, "shortage")
            elif worker_slot.state == "starting" and worker_slot.since <= now:
                losses += self._on_start_timeout(worker_slot)
        if now >= self._next_health_check:
            self._next_health_check = now + HEALTH_CHECK_INTERVAL
            for worker_slot in self.ready:
                if not worker_slot.check_heartbeat():
                    seconds = MAX_MISSED_HEARTBEATS * HEALTH_CHECK_INTERVAL
                    why = f"{worker_slot.worker} is idle and has sent no heartbeat for {seconds:g} s; is it stopped?"
                    losses.append(self.mark_dead(worker_slot, why))
                elif worker_slot.worker is not None:
                    worker_slot.worker.request_heartbeat()
        if all(worker_slot.state == "lost" for worker_slot in self.worker_slots):
            raise WorkerError(
                "no worker is left: " + "; ".join(worker_slot.last_failure for worker_slot in self.worker_slots)
            )
        return losses

    def _on_start_timeout(self, worker_slot: WorkerSlot[Batch]) -> list[WorkerLoss[Batch]]:
        """Give up a worker that did not start in time; extend its deadline if it waits for another worker's weights."""
        assert worker_slot.worker is not None
        if self.startup.blocked_by(worker_slot.worker) is not None:
            worker_slot.since += self._start_timeout
            return []
        late = f"{worker_slot.worker} did not {self.startup.pending_step(worker_slot.worker)}"
        reason: Reason | None = "outside" if worker_slot.worker.pid is None else None
        return [self.mark_dead(worker_slot, f"{late} within {self._start_timeout:g} s (start_timeout)", reason)]

    @property
    def next_deadline(self) -> float:
        """The time of the next `check_health`, on the leader's clock."""
        deadline = self._next_health_check
        for worker_slot in self.worker_slots:
            if worker_slot.state in ("starting", "restarting"):
                deadline = min(deadline, worker_slot.since)
        return deadline

    def _schedule_restart(self, worker_slot: WorkerSlot[Batch], reason: Reason) -> None:
        now = self.clock.now()
        worker_slot.retry_budget_used += SLOT_RETRY_COST[reason]
        self._set_state(worker_slot, "restarting")
        down_too_long = not self.ready and now - self._down_since >= self._start_timeout
        if worker_slot.retry_budget_used > 1 - 1e-9 or (reason == "outside" and down_too_long):
            self._set_state(worker_slot, "lost")
        most = MAX_BACKOFF["serving" if self.ready else "down"]
        worker_slot.since = now + min(most, BACKOFF * 2 ** min(10, worker_slot.restarts))
        worker_slot.restarts += 1

    def close(self, grace: float = SHUTDOWN_TIMEOUT) -> None:
        self._pool.close(grace)
        self.startup.close()
