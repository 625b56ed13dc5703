"""Settings: the ways of sampling that are compared with the untouched one."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from drp.sampling.mode_selection import DEFAULT_TOLERANCE, make_mode
from drp.sampling.modes import Mode

BETTER_SOLVER = "unipc"
"""The solver of the rivals that have fewer steps of another solver than the untouched run."""


@dataclass(frozen=True)
class Drafted:
    """Drafting in a mode with n drafts per round; None means the default."""

    mode: str
    drafts: int
    stride: float | None = None
    tolerance: float | None = None
    rule: str | None = None

    @property
    def label(self) -> str:
        parts = [self.mode, f"n = {self.drafts}"]
        parts += [f"stride {self.stride:g}"] if self.stride is not None else []
        parts += [f"tolerance {self.tolerance:g}"] if self.tolerance is not None else []
        return ", ".join(parts + ([f"rule {self.rule}"] if self.rule is not None else []))

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `drp.sample` and `drp.diffusers.parallelize` for this setting."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def key(self) -> str:
        """A name for files."""
        return _key(self.label)

    def make_mode(self, adds_noise: bool = False) -> Mode:
        """Return the mode, for a solver that adds noise or does not; raise ValueError for options that it lacks."""
        tolerance = DEFAULT_TOLERANCE if self.tolerance is None else self.tolerance
        return make_mode(self.mode, self.drafts, tolerance, self.rule, self.stride, None, adds_noise)

    def rounds(self, steps: int, adds_noise: bool = False) -> int | None:
        """Return the rounds that `steps` steps take, None if they are not known before the run."""
        mode = self.make_mode(adds_noise)
        return None if mode.feedback else len(list(mode.rounds(steps)))


@dataclass(frozen=True)
class FewerSteps:
    """Fewer sequential steps, of the untouched run's solver or of another one: the alternative without drp."""

    steps: int
    solver: str | None = None

    @property
    def label(self) -> str:
        return f"{self.steps} steps" + (f" of {self.solver}" if self.solver else "")

    @property
    def key(self) -> str:
        return _key(self.label)


Setting = Drafted | FewerSteps


def default_drafts(capacity: int) -> tuple[int, ...]:
    """Return the numbers of drafts to try where the devices evaluate `capacity` drafts at once: 2, 4, 8, ..., all."""
    powers = itertools.takewhile(lambda n: n < capacity, (2**i for i in itertools.count(1)))
    return (*powers, max(2, capacity))


def expand(
    modes: Sequence[str],
    drafts: Sequence[int],
    strides: Sequence[float] = (),
    tolerances: Sequence[float] = (),
    rule: str | None = None,
    steps: int = 48,
    adds_noise: bool = False,
) -> list[Drafted]:
    """Return the settings of all modes with all numbers of drafts, each once.

    Strides apply to the window, tolerances to the adaptive mode. Of settings that have the same rounds for `steps`
    steps the first is kept. Raises ValueError for a mode, a stride or a tolerance that does not exist.
    """
    modes = [modes] if isinstance(modes, str) else modes
    found: dict[object, Drafted] = {}
    for mode, n in itertools.product(modes, drafts):
        fitting = [stride for stride in strides if stride <= n]
        choices: list[Drafted]
        if mode == "window" and strides:
            choices = [Drafted(mode, n, stride=stride, rule=rule) for stride in fitting]
        elif mode == "adaptive" and tolerances:
            choices = [Drafted(mode, n, tolerance=tolerance, rule=rule) for tolerance in tolerances]
        else:
            choices = [Drafted(mode, n, rule=rule)]
        for setting in choices:
            made = setting.make_mode(adds_noise)
            rounds = (
                setting if made.feedback else tuple((r.base, r.predict, r.unawaited_rounds) for r in made.rounds(steps))
            )
            found.setdefault(rounds, setting)
    if not found:
        raise ValueError(
            f"strides {list(strides)} leave nothing to compare: a window of n drafts advances by 1 to n steps"
        )
    return list(found.values())


def check_values(
    modes: Sequence[str], drafts: Sequence[int], strides: Sequence[float], tolerances: Sequence[float]
) -> None:
    """Raise ValueError for a value that no setting can have, whatever the model and the devices."""
    if not modes:
        raise ValueError("modes is empty; name at least one")
    for mode, n in itertools.product(modes, drafts or (2,)):
        Drafted(mode, n).make_mode()
    for stride in strides:
        Drafted("window", max(2, math.ceil(stride)) if math.isfinite(stride) else 2, stride=stride).make_mode()
    for tolerance in tolerances:
        Drafted("adaptive", 2, tolerance=tolerance).make_mode()


def fewer_steps(settings: Sequence[Drafted], steps: int, adds_noise: bool = False) -> list[FewerSteps]:
    """Return rivals with as many sequential steps as the settings have rounds, of the same and of a better solver."""
    rounds = {r for setting in settings if (r := setting.rounds(steps, adds_noise)) is not None and r < steps}
    counts = sorted(rounds, reverse=True)
    return [FewerSteps(count, solver) for count in counts for solver in (None, BETTER_SOLVER)]


def _key(label: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", label.lower().replace("n = ", "n"))
