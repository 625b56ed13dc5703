"""Schedulers of diffusers: copies that are stepped ahead to make drafts, and their noise levels."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

from torch import Tensor

from drp.sampling import drafts
from drp.sampling.predictions import PREDICTION_TYPES, estimates

BROWNIAN = ("BrownianTreeNoiseSampler", "BatchedBrownianTree")
"""Classes of noise samplers that cannot be deep-copied and need not be."""
MIDWAY = "DPMSolverSDE"
"""Prefix of the schedulers that evaluate every second time between two of their sigmas."""
IN_SIGMA = ("Euler", "Heun", "LMS", MIDWAY)
"""Prefixes of the schedulers whose state is data + sigma noise."""
OTHERWISE = ("EDM", "Cosine", "KDPM2")
"""Prefixes of the schedulers that precondition the model, or whose sigmas are not in the order of the timesteps."""
BY_TIMESTEP = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "CogVideoXDDIMScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "UnCLIPScheduler",
)
"""Schedulers that look up alpha-bar by the timestep."""


RENOISING = ("LCM", "TCD", "FlowMatchLCM", "CMStochastic", "SCM", "HeliosDMD")
"""Prefixes of the schedulers that add new noise to the whole data estimate at every step."""


def why_drafts_differ(scheduler: Any) -> str:
    """Return why drafted samples do not converge to the sequential ones with more steps, empty if they do.

    If the model output has an effect on a step that does not shrink with the step's length, the error of an output
    predicted at a draft is the same at 1000 steps as at 10. `python -m bench.convergence` measures this.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if name.startswith(RENOISING) or config.get("stochastic_sampling"):
        return f"{name} makes new noise of its estimate of the data at every step"
    return ""


NOISY = ("DDPM", "UnCLIP", MIDWAY, "SASolver", "CogVideoXDPM")
"""Prefixes of the schedulers that add noise at each step, in addition to ancestral ones."""


def adds_noise(scheduler: Any) -> bool:
    """Return whether a scheduler adds noise at each step, by its class and its configuration."""
    name = type(scheduler).__name__
    algorithm = str(scheduler.config.get("algorithm_type", ""))
    return name.startswith(NOISY) or "Ancestral" in name or algorithm.startswith("sde")


TABLES = ("timesteps", "sigmas", "betas", "alphas", "alphas_cumprod", "alpha_t", "sigma_t", "lambda_t")
"""Tensors of a scheduler that its steps only read, so that copies share them."""


def copy_of(scheduler: Any, hidden: tuple[str, ...]) -> Any:
    """Return a copy of a scheduler in its current state, without the attributes `hidden`."""
    made = object.__new__(type(scheduler))
    # Copies may share a Brownian tree, whose noise of an interval does not depend on the order of the queries.
    memo: dict[int, Any] = {id(v): v for v in vars(scheduler).values() if type(v).__name__ in BROWNIAN}
    memo.update((id(table), table) for name in TABLES if (table := vars(scheduler).get(name)) is not None)
    for name, value in vars(scheduler).items():
        if name not in hidden:
            made.__dict__[name] = value if name == "_internal_dict" else copy.deepcopy(value, memo)
    return made


JUMPING = ("DDIMScheduler", "DDIMParallelScheduler")
"""Schedulers whose next state combines a clipped data estimate with the unclipped model output, so that it jumps.

With others, such as DDPM and DPM-Solver, the weight of the clipped estimate shrinks with the step.
"""
FEW_CLIPPED = 1e-3
"""The share of an estimate's numbers below which clipping is ignored."""


class SchedulerLevels:
    """The estimate of the data by a scheduler: c_x times the state and c_p times the model's output, at each index.

    known: False for schedulers whose noise levels are unknown. Their drafts assume a constant model output.
    limit: the bound to which the scheduler clips the estimate, None if it does not.
    clipped: whether it has clipped one, which then is no longer this sum.
    """

    def __init__(self, scheduler: Any, timesteps: Tensor) -> None:
        config = scheduler.config
        name = type(scheduler).__name__
        flow = "FlowMatch" in name or bool(config.get("use_flow_sigmas"))
        kind = config.get("prediction_type", "epsilon")
        self._type: str = {"v_prediction": "v", "flow_prediction": "flow"}.get(kind, kind)
        if flow:
            self._type = "flow" if kind == "flow_prediction" or "FlowMatch" in name else ""
        self.limit: float | None = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else None
        if config.get("thresholding"):
            self.limit = 1.0
        self.clipped = False
        self._name = name
        levels = self._read(scheduler, name, flow, timesteps) if self._type in PREDICTION_TYPES else []
        # Without signal, the noise determines no data; without noise, nothing is left to predict.
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
        values: list[float] = sigmas[:n].double().tolist()
        if name.startswith(MIDWAY):
            values[1::2] = [math.sqrt(a * b) for a, b in zip(values[::2], values[1::2], strict=False)]
        if flow:
            return [(1 - s, s, 1.0) for s in values]
        scale = [1 / math.sqrt(s * s + 1) for s in values]
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
            return [(a, s * a, 1.0) for s, a in zip(values, scale, strict=True)]
        if name.startswith(IN_SIGMA):
            return [(a, s * a, a) for s, a in zip(values, scale, strict=True)]
        return []

    def clips(self, k: int, x: Tensor, output: Tensor) -> bool:
        """Return whether the scheduler clips the data estimate at a step; if so, also clip the estimates of drafts."""
        if self.limit is None or self.clipped:
            return self.clipped
        if not self._levels or output.shape != x.shape:
            self.clipped = True  # as far as is known
        else:
            at_state, at_output = self.factors(k)
            data = at_state * x.double() + at_output * output.double()
            self.clipped = float((data.abs() > self.limit).double().mean()) > FEW_CLIPPED
        return self.clipped

    @property
    def jumps(self) -> bool:
        """Whether the latents jumped because the estimate was clipped."""
        return self.clipped and self._name in JUMPING

    @property
    def prediction_type(self) -> str:
        """What the model predicts: "epsilon", "v", "sample" or "flow"."""
        return self._type

    @functools.cached_property
    def of_run(self) -> drafts.Levels:
        alphas, sigmas = (tuple(level[i] for level in self._levels) for i in (0, 1))
        return drafts.Levels(alphas, sigmas, self._timesteps, self._type)

    @property
    def known(self) -> bool:
        """Whether `factors` is known."""
        return bool(self._levels) and not self.clipped

    def factors(self, k: int) -> tuple[float, float]:
        """Return c_x and c_p at index k of the timesteps."""
        alpha, sigma, scale = self._levels[k]
        read = estimates(self._type, alpha, sigma)
        return read.data_x * scale, read.data_p
