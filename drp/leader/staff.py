"""Staff: a place for each device, a worker in it, and another when that one is lost."""

from __future__ import annotations

import logging
import signal
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from drp.errors import WorkerError
from drp.leader.active import Sent
from drp.leader.clock import Clock
from drp.leader.crew import Crew
from drp.leader.devices import Device
from drp.leader.ground import Ground
from drp.leader.pool import GRACE, Pool, WorkerProcess, failure
from drp.protocol.codec import encode
from drp.protocol.messages import Bind, Failed, ToLeader, ToWorker

TICK = 1.0
"""Seconds between two looks at whether idle workers come round."""
STILL = 5
"""Looks at which an idle worker had not come round, after which it counts as lost."""
BACKOFF = (0.5, 2.0)
"""Seconds before a lost worker is replaced: at first, twice as long each time, at most."""
MOST_DRAFT = {"outside": 1 / 4, "own": 1 / 3}
"""The share of the losses that a draft is allowed: to a signal from outside, or by the worker's own fault: a crash, a
hang, an exit. Of one it would be given up after four, of the other after three."""
MOST_PLACE = {"shortage": 1 / 60, "outside": 1 / 20, "own": 1 / 8}
"""Likewise for a place, in a row, none of its workers having answered anything. A shortage: no worker can be started,
because this process or the machine has no memory, descriptors or processes left; the place is tried for two minutes."""
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)

log = logging.getLogger(__name__)
State = Literal["starting", "ready", "away", "lost"]
Fault = Literal["outside", "own"]
Reason = Literal["shortage", "outside", "own"]


@dataclass
class Station:
    """A device's place: the worker there, and the drafts it has, since when it is busy with the first."""

    number: int
    device: Device
    worker: WorkerProcess | None = None
    state: State = "away"
    generation: int = 0
    drafts: deque[Sent] = field(default_factory=deque)
    post: list[bytes] = field(default_factory=list)
    """What it is to be sent."""
    binds: dict[int, Bind] = field(default_factory=dict)
    """What its worker was told of the memory of runs, by number."""
    kept: Bind | None = None
    """Likewise, of the one that it keeps."""
    since: float = 0.0
    """Of state starting or away too: until when."""
    used_up: float = 0.0
    """How much of the losses allowed it has had since its last answer."""
    last: str = ""
    """How its last worker ended."""
    _beats: int = -1
    _still: int = 0

    def comes_round(self) -> bool:
        """Look whether an idle worker has come round since a few looks ago. Time that all processes slept is none."""
        assert self.worker is not None
        beats = self.worker.beats
        self._still = 0 if self.drafts or beats != self._beats else self._still + 1
        self._beats = beats
        return self._still < STILL


@dataclass(frozen=True)
class Loss:
    """A worker that is gone, why, whose fault it was, and the drafts it had."""

    station: Station
    why: str
    fault: Fault
    drafts: tuple[Sent, ...]


class Staff:
    """The stations of one leader, each with a worker or waiting for one."""

    def __init__(
        self,
        pool: Pool,
        model: str,
        devices: Sequence[Device],
        start_timeout: float,
        ground: Ground,
        clock: Clock,
    ) -> None:
        self.clock, self._ground = clock, ground
        self.stations = [Station(number, device) for number, device in enumerate(devices)]
        self._pool, self._crew, self._start_timeout = pool, Crew(pool, model, devices, ground), start_timeout
        self._next_tick = clock.now() + TICK
        self.ready: tuple[Station, ...] = ()
        """Stations that take drafts."""

    def _turn(self, station: Station, state: State) -> None:
        station.state = state
        self.ready = tuple(station for station in self.stations if station.state == "ready")

    @property
    def crew(self) -> Crew:
        """Those who bring workers up, and know what the model is."""
        return self._crew

    def post(self, station: Station, message: ToWorker) -> None:
        """Have something sent to a station's worker with the next `deliver`, if it is still there then."""
        if station.worker is not None:
            station.post.append(encode(message))

    def deliver(self, stations: Iterable[Station]) -> None:
        """Send what was posted, to each worker together; one that is gone shows at the next `poll`."""
        for station in stations:
            if station.worker is not None and station.post:
                self._pool.send(station.worker, *station.post)
                station.post.clear()

    def start(self, station: Station) -> None:
        """Put a new worker into a place; OSError or MemoryError if the machine, or this process, has none to give."""
        station.since = self.clock.now() + self._start_timeout
        station.worker = self._pool.spawn(station.number, station.generation, station.device)
        station.generation += 1
        self._turn(station, "starting")
        self._crew.expect(station.worker)

    def station_of(self, worker: WorkerProcess) -> Station:
        """Return the place of a worker."""
        return self.stations[worker.number]

    def take(self, station: Station, message: ToLeader | None) -> Loss | None:
        """Take what the worker of a starting station said, or, for any station, that it failed or ended (None)."""
        worker = station.worker
        assert worker is not None
        if message is None:
            return self.lose(station, "")
        if isinstance(message, Failed):
            return self.lose(station, failure(worker, message))
        try:
            if self._crew.answer(worker, message):
                station.since = self.clock.now()
                self._turn(station, "ready")
        except (MemoryError, OSError) as error:
            return self.lose(station, f"there is no room for {worker}: {error}", "shortage")
        except RuntimeError as error:  # WorkerError, and what CUDA and torch say
            return self.lose(station, str(error))
        return None

    def lose(self, station: Station, why: str, reason: Reason | None = None) -> Loss:
        """Give a worker up, by force if it is still there; `why` is empty for one that ended. It will be replaced.

        `reason` is that of the loss, by default as its end says.
        """
        worker = station.worker
        assert worker is not None
        name, stopped = str(worker), worker.is_stopped
        how, code = self._pool.retire(worker)
        self._crew.lose(worker)  # only now: another may be told to write where it has written
        outside = stopped or (not why and code is not None and code < 0 and -code not in CRASHES)
        why += "; it was stopped" if stopped else ""
        station.last = why or f"{name} {how}"
        drafts = tuple(station.drafts)
        station.drafts.clear()
        station.post.clear()
        station.binds.clear()
        station.kept = None
        station.worker = None
        fault: Fault = "outside" if outside else "own"
        self._wait(station, reason or fault)
        log.warning("lost: %s", station.last)
        return Loss(station, station.last, fault, drafts)

    def tend(self) -> list[Loss]:
        """Replace workers whose turn has come; return those that did not start in time, or idle and do not move."""
        now, losses = self.clock.now(), []
        for station in self.stations:
            if station.state == "away" and station.since <= now:
                try:
                    self.start(station)
                except (OSError, MemoryError) as error:
                    station.last = f"{station.device.name}: no process can be started: {error}"
                    log.warning("%s", station.last)
                    self._ground.free_unused()
                    self._wait(station, "shortage")
            elif station.state == "starting" and station.since <= now:
                losses += self._late(station)
        if now >= self._next_tick:
            self._next_tick = now + TICK
            for station in self.ready:
                if not station.comes_round():
                    why = f"{station.worker} does not come round, though it has nothing to do; is it stopped?"
                    losses.append(self.lose(station, why))
        if all(station.state == "lost" for station in self.stations):
            raise WorkerError("no worker is left: " + "; ".join(station.last for station in self.stations))
        return losses

    def _late(self, station: Station) -> list[Loss]:
        """Give up a worker that did not start in time; one that waits for another's weights gets its time again."""
        assert station.worker is not None
        if self._crew.held_up_by(station.worker) is not None:
            station.since += self._start_timeout
            return []
        late = f"{station.worker} did not {self._crew.doing(station.worker)}"
        return [self.lose(station, f"{late} within {self._start_timeout:g} s (start_timeout)")]

    @property
    def next_time(self) -> float:
        """When there is something to tend to."""
        times = [station.since for station in self.stations if station.state in ("starting", "away")]
        return min([*times, self._next_tick])

    def _wait(self, station: Station, reason: Reason) -> None:
        first, most = BACKOFF
        pause = first * 2 ** min(10, round(station.used_up / MOST_PLACE["outside"]))
        station.used_up += MOST_PLACE[reason]
        self._turn(station, "lost" if station.used_up > 1 - 1e-9 else "away")
        station.since = self.clock.now() + min(most, pause)

    def close(self, grace: float = GRACE) -> None:
        """End all workers and give back the weights."""
        self._pool.close(grace)
        self._crew.close()
