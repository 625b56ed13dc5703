"""Scheduler: copies of a pipeline's scheduler, stepped ahead to make drafts, and what is known of its noise levels."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from drp.sampling import drafts
from drp.sampling.predictions import PREDICTION_TYPES, estimates

IN_SIGMA = ("Euler", "Heun", "LMS")
"""Beginnings of the names of schedulers whose state is data + sigma noise, with sigma from 0 up."""
OTHERWISE = ("EDM", "Cosine", "KDPM2")
"""Beginnings of the names of those that precondition the model, or whose sigmas are not the timesteps' in order."""
BY_TIMESTEP = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "CogVideoXDDIMScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
)
"""Schedulers that look alpha-bar up by the timestep."""


def copy_of(scheduler: Any, hidden: tuple[str, ...]) -> Any:
    """Return a scheduler that goes on from where this one is, without the attributes `hidden`."""
    made = object.__new__(type(scheduler))
    memo: dict[int, Any] = {}
    for name, value in vars(scheduler).items():
        if name not in hidden:
            made.__dict__[name] = value if name == "_internal_dict" else copy.deepcopy(value, memo)
    return made


def copy_generators(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with copies of the random generators in them, which then draw the numbers that these will."""
    return {name: _copy_generator(value) for name, value in arguments.items()}


def _copy_generator(value: Any) -> Any:
    if isinstance(value, list):
        return [_copy_generator(item) for item in value]
    if isinstance(value, torch.Generator):
        made = torch.Generator(value.device)
        made.set_state(value.get_state())
        return made
    return value


class Levels:
    """The estimate of the data by a scheduler: c_x times the state and c_p times the model's output, at each index.

    `known` is False for schedulers whose noise levels drp does not know, and those that clip the estimate: their drafts
    assume that the model's output stays.
    """

    def __init__(self, scheduler: Any, timesteps: Tensor) -> None:
        config = scheduler.config
        name = type(scheduler).__name__
        flow = "FlowMatch" in name or bool(config.get("use_flow_sigmas"))
        kind = config.get("prediction_type", "epsilon")
        self._type: str = {"v_prediction": "v", "flow_prediction": "flow"}.get(kind, kind)
        if flow:
            self._type = "flow" if kind == "flow_prediction" or "FlowMatch" in name else ""
        clips = bool(config.get("clip_sample")) or bool(config.get("thresholding"))
        linear = self._type in PREDICTION_TYPES and not clips
        levels = self._read(scheduler, name, flow, timesteps) if linear else []
        # Where there is no signal, noise says nothing of the data; where there is no noise, nothing is left to predict.
        usable = all(sigma > 0 and (alpha > 0 or self._type != "epsilon") for alpha, sigma, _ in levels)
        self._levels = levels if usable else []
        self._timesteps = tuple(float(t) for t in timesteps)

    def _read(self, scheduler: Any, name: str, flow: bool, timesteps: Tensor) -> list[tuple[float, float, float]]:
        """Return alpha, sigma and the state's scale at each timestep."""
        n = len(timesteps)
        if name in BY_TIMESTEP:
            bars = scheduler.alphas_cumprod[timesteps.long().cpu()].double()
            return [(math.sqrt(b), math.sqrt(1 - b), 1.0) for b in bars.tolist()]
        sigmas = getattr(scheduler, "sigmas", None)
        if not isinstance(sigmas, Tensor) or len(sigmas) < n or name.startswith(OTHERWISE):
            return []
        values = [float(s) for s in sigmas[:n].double()]
        if flow:
            return [(1 - s, s, 1.0) for s in values]
        scale = [1 / math.sqrt(s * s + 1) for s in values]
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            return [(a, s * a, 1.0) for s, a in zip(values, scale, strict=True)]
        if name.startswith(IN_SIGMA):
            return [(a, s * a, a) for s, a in zip(values, scale, strict=True)]
        return []

    @property
    def prediction_type(self) -> str:
        """What the model predicts: "epsilon", "v", "sample" or "flow"."""
        return self._type

    @functools.cached_property
    def of_run(self) -> drafts.Levels:
        """What a draft rule may know."""
        alphas, sigmas = (tuple(level[i] for level in self._levels) for i in (0, 1))
        return drafts.Levels(alphas, sigmas, self._timesteps, self._type)

    @property
    def known(self) -> bool:
        """Whether `factors` says anything."""
        return bool(self._levels)

    def factors(self, k: int) -> tuple[float, float]:
        """Return c_x and c_p at index k of the timesteps."""
        alpha, sigma, scale = self._levels[k]
        read = estimates(self._type, alpha, sigma)
        return read.data_x * scale, read.data_p
