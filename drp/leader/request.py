"""Request: what a caller asks of one sampling run, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from drp.protocol.messages import ModelSpec
from drp.sampling.drafts import PAPER
from drp.sampling.grids import scaled_linear
from drp.sampling.modes import Mode, make_mode
from drp.sampling.run import Callback, Noise
from drp.sampling.solvers import DDIM

MOST_DRAFTS = 1024
MOST_NUMBERS = 2**34


class Options(TypedDict, total=False):
    """The keyword arguments of `sample` and `reference` that describe a run; see `Request`."""

    labels: Sequence[int] | Tensor | None
    count: int | None
    shape: Sequence[int] | None
    cond: Mapping[str, Tensor]
    guidance: float | None
    steps: int
    mode: str | Mode
    drafts: int | None
    seed: int
    callback: Callback | None
    residuals: bool


@dataclass(frozen=True)
class Request:
    """One run as asked for.

    labels: classes, one a sample, for a model that has classes.
    count: how many samples; by default as many as labels, else 1.
    shape: one sample's shape, without the batch, for a model that does not say.
    cond: tensors handed to the denoiser by name, as they are.
    guidance: scale of classifier-free guidance; by default the model's.
    steps: N, the steps of the solver.
    mode: "sequential", "conservative", "aggressive", or a mode object of your own.
    drafts: n, the drafts a round; by default one a device. The samples depend on it, and not on the devices.
    seed: of the noise; sample i has the same whatever the count.
    callback: called as callback(k, state) once for each step k = 1..N, in order; the state [B, ...] is a view, valid
        during the call. It runs while the workers compute. What it raises ends the run.
    """

    labels: Sequence[int] | Tensor | None = None
    count: int | None = None
    shape: Sequence[int] | None = None
    cond: Mapping[str, Tensor] = field(default_factory=dict)
    guidance: float | None = None
    steps: int = 48
    mode: str | Mode = "aggressive"
    drafts: int | None = None
    seed: int = 0
    callback: Callback | None = None
    residuals: bool = False


@dataclass(frozen=True)
class Job:
    """A request worked out for a model: all that a run needs."""

    solver: DDIM
    mode: Mode
    noise: Tensor
    cond: dict[str, Tensor]
    fresh: Noise | None = None


def make_job(request: Request, spec: ModelSpec, devices: int) -> Job:
    """Return the job for a model and a number of devices; raise ValueError, naming value and remedy, if it can't be."""
    solver = DDIM(scaled_linear(_whole("steps", request.steps)))
    mode = _mode(request, devices)
    labels = _labels(request.labels, spec)
    count = _count(request.count, labels)
    shape = _shape(request.shape, spec)
    if count * math.prod(shape) * 2 * mode.width > MOST_NUMBERS:
        raise ValueError(f"count {count} of shape {list(shape)} with {mode.width} drafts is too large; ask for fewer")
    cond = _cond(request, spec)
    if labels is not None:
        cond["labels"] = labels
    return Job(solver, mode, _noise(_whole("seed", request.seed), count, shape), cond)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {value!r}; give a whole number from 0")
    return value


def _mode(request: Request, devices: int) -> Mode:
    if isinstance(request.mode, str):
        drafts = devices if request.drafts is None else _whole("drafts", request.drafts)
        mode = make_mode(request.mode, drafts, 0.01, PAPER)
    elif request.drafts is not None:
        raise ValueError(f"drafts is {request.drafts}, but {request.mode} is a mode object and says itself how many")
    else:
        mode = request.mode
    if mode.width > MOST_DRAFTS:
        raise ValueError(f"{mode.width} drafts a round; at most {MOST_DRAFTS}")
    return mode


def _labels(labels: Sequence[int] | Tensor | None, spec: ModelSpec) -> Tensor | None:
    if labels is None:
        if spec.classes is not None:
            raise ValueError(f"labels are missing; this model needs one a sample, from 0 to {spec.classes - 1}")
        return None
    try:
        given = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels {labels!r:.80} are not whole numbers: {error}") from None
    if given.dim() != 1 or len(given) == 0 or given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"labels {labels!r:.80} must be a list of one or more whole numbers")
    if spec.classes is not None:
        for label in given.tolist():
            if not 0 <= label < spec.classes:
                raise ValueError(f"label {label} is out of range; this model has the classes 0 to {spec.classes - 1}")
    return given.long()


def _count(count: int | None, labels: Tensor | None) -> int:
    if count is None:
        return 1 if labels is None else len(labels)
    if _whole("count", count) == 0:
        raise ValueError("count is 0; ask for 1 sample or more")
    if labels is not None and len(labels) != count:
        raise ValueError(f"count is {count}, but there are {len(labels)} labels; give one a sample")
    return count


def _shape(shape: Sequence[int] | None, spec: ModelSpec) -> tuple[int, ...]:
    if shape is None:
        if spec.sample_shape is None:
            raise ValueError("shape is missing; this model does not say the shape of a sample, so give it")
        return spec.sample_shape
    own = tuple(_whole("shape", n) for n in shape)
    if len(own) > 15 or 0 in own:
        raise ValueError(f"shape is {list(own)}; give 0 to 15 sizes of 1 or more")
    if spec.sample_shape is not None and own != spec.sample_shape:
        raise ValueError(f"shape is {list(own)}, but this model's samples are {list(spec.sample_shape)}")
    return own


def _cond(request: Request, spec: ModelSpec) -> dict[str, Tensor]:
    cond: dict[str, Tensor] = {}
    for name, value in request.cond.items():
        if not isinstance(name, str) or not 0 < len(name) <= 200 or not isinstance(value, Tensor):
            raise ValueError(f"cond[{name!r:.80}] is a {type(value).__name__}; cond holds tensors by name")
        if name in ("labels", "guidance"):
            raise ValueError(f"cond[{name!r}]: {name} is an argument of its own; give it there")
        cond[name] = value
    if len(cond) > 60:
        raise ValueError(f"cond holds {len(cond)} tensors; at most 60")
    guidance = spec.guidance if request.guidance is None else request.guidance
    if guidance is not None:
        if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not math.isfinite(guidance):
            raise ValueError(f"guidance is {guidance!r}; give a finite number")
        cond["guidance"] = torch.tensor(float(guidance))
    return cond


def _noise(seed: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Draw one sample after the other, so that a sample's noise does not depend on how many are asked for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(count)])
