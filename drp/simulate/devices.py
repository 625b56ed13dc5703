"""Simulated devices: the times of evaluations, and failures."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from drp.leader.devices import parse_emulated
from drp.leader.events import TraceEvent
from drp.protocol.messages import Emulated
from drp.workers.emulated import seconds_of

MAX_DEVICES = 1024
Distribution = Literal["normal", "lognormal", "exponential", "measured"]
DISTRIBUTIONS = get_args(Distribution)


@dataclass(frozen=True)
class SimulatedDevice:
    """A simulated device.

    emulated: its times, as in `drp.leader.devices`.
    distribution: the distribution of the jitter, with the mean and the standard deviation of `emulated`. "normal" uses
        the same draws as an emulated device, "exponential" is the sum of a fixed and an exponential time, "measured"
        draws from `measured`.
    measured: times in seconds.
    mtbf: the mean time between failures in seconds, exponentially distributed; 0 for no failures.
    restart: seconds until a failed device accepts drafts again.
    """

    emulated: Emulated
    distribution: Distribution = "normal"
    measured: tuple[float, ...] = ()
    mtbf: float = 0.0
    restart: float = 10.0

    @property
    def link(self) -> float:
        """The latency of the link in one direction, in seconds."""
        return self.emulated.latency

    def seconds(self, run: int, step: int, draws: random.Random, width: int = 1) -> float:
        """Return the time of an evaluation in seconds, in a round of `width` drafts."""
        e = self.emulated
        if self.distribution == "normal":
            return seconds_of(e, run, step)
        if self.distribution == "measured":
            return draws.choice(self.measured)
        factor = e.straggler_factor if draws.random() < e.straggler_share else 1.0
        if not e.jitter:
            return e.seconds * factor
        if self.distribution == "exponential":
            return e.seconds * factor * (1 - e.jitter + draws.expovariate(1.0) * e.jitter)
        variance = math.log(1 + e.jitter**2)
        return e.seconds * factor * draws.lognormvariate(-variance / 2, math.sqrt(variance))


def make_devices(names: str | Sequence[str], distribution: str = "normal") -> tuple[SimulatedDevice, ...]:
    """Return up to 1,024 devices for names such as `8xemulated:20ms:jitter=10%`.

    Raises ValueError for other devices or an unknown distribution.
    """
    if distribution not in DISTRIBUTIONS[:-1]:
        raise ValueError(f"distribution {distribution!r} does not exist; choose one of {', '.join(DISTRIBUTIONS[:-1])}")
    found: list[SimulatedDevice] = []
    for name in names.split(",") if isinstance(names, str) else names:
        several = re.fullmatch(r"(?:(\d{1,4})x)?(emulated:.*)", name.strip())
        if several is None:
            raise ValueError(f"device {name!r} cannot be simulated; write emulated:TIME, or 8xemulated:TIME")
        for _ in range(int(several[1] or 1)):
            found.append(SimulatedDevice(parse_emulated(several[2], len(found)), distribution))  # type: ignore[arg-type]  # checked
            if len(found) > MAX_DEVICES:
                raise ValueError(f"more than {MAX_DEVICES} devices; the simulator has at most as many")
    if not found:
        raise ValueError(f"devices is {names!r}; give 1 to {MAX_DEVICES}")
    return tuple(found)


def measured(devices: Sequence[SimulatedDevice], timeline: Sequence[TraceEvent]) -> tuple[SimulatedDevice, ...]:
    """Return the devices with times drawn from the evaluations in a trace."""
    times = tuple(mark.seconds for mark in timeline if mark.kind == "predicted")
    if not times:
        raise ValueError("no evaluation in this trace has ended; trace a run")
    return tuple(replace(device, distribution="measured", measured=times) for device in devices)


def repeated(devices: Sequence[SimulatedDevice], count: int) -> tuple[SimulatedDevice, ...]:
    """Return `count` devices, repeating the given ones in turn, each with its own random draws."""
    if not 1 <= count <= MAX_DEVICES:
        raise ValueError(f"{count} devices; give 1 to {MAX_DEVICES}")
    like = [devices[i % len(devices)] for i in range(count)]
    return tuple(replace(device, emulated=replace(device.emulated, number=i)) for i, device in enumerate(like))
