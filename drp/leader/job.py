"""Jobs: requests that were validated for a model, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drp.leader.request import Request
from drp.limits import (
    MAX_DRAFTS,
    MAX_EVALUATIONS,
    MAX_GUIDANCE,
    MAX_NUMBERS,
    MAX_SAMPLES,
    MAX_STEPS,
    MAX_TIMESTEP,
    check_whole,
)
from drp.protocol.codec import is_text
from drp.protocol.frames import MAX_DIMENSIONS
from drp.protocol.memory import DTYPES, NAMES
from drp.protocol.messages import ModelSpec
from drp.sampling.drafts import find_rule
from drp.sampling.mode_selection import MODE_NAMES, TargetWindow, check_tolerance, make_mode
from drp.sampling.mode_wrappers import PicardSweeps, Warmup
from drp.sampling.modes import Mode, Window
from drp.sampling.partial_sums import OperationQueue
from drp.sampling.registry import SOLVER_NAMES, make_solver
from drp.sampling.run import Noise, Run
from drp.sampling.slot_allocator import slots
from drp.sampling.solvers import Solver

OF_NAMED_MODES = ("drafts", "rule", "target_speedup", "target_rounds", "stride", "offsets")


@dataclass(frozen=True)
class Job:
    """A validated request for one model, with everything that a run needs. `start` [B, ...] is the state at index 0."""

    solver: Solver
    mode: Mode
    start: Tensor
    cond: dict[str, Tensor]
    fresh: Noise
    watch: bool
    out: Tensor | None

    def slots(self, checkpoints: bool) -> int:
        """Return the number of slots that the run needs for drafts; it needs as many for predictions."""
        return slots(self.solver, self.mode, checkpoints)

    def run(self, drafts: Tensor, predictions: Tensor, queue: OperationQueue | None = None) -> Run:
        """Return the run, whose drafts and predictions are rows of these matrices [slots, D].

        If a queue is given, the run's arithmetic is enqueued there, and the run has checkpoints.
        """
        checkpoints = queue is not None
        return Run(self.solver, self.mode, self.start, drafts, predictions, self.fresh, self.watch, queue, checkpoints)

    def to(self, device: torch.device) -> Job:
        """Return the job with its states on a device."""
        if device == self.start.device:
            return self
        fresh = self.fresh

        def there(k: int) -> Tensor:
            noise = fresh(k)  # Pinned for the copy to a GPU, so that the host does not wait for the GPU's queue.
            return (noise.pin_memory() if device.type == "cuda" else noise).to(device, non_blocking=True)

        return replace(self, start=self.start.to(device), fresh=there)

    def samples(self, state: Tensor) -> Tensor:
        """Copy a finished run's state to host memory: to `out` if given, else to a new tensor."""
        if self.out is None:
            return state.clone() if state.is_cpu else state.cpu()
        with torch.inference_mode():  # `out` may be an inference tensor, which can be written to only here.
            self.out.copy_(state)
        return self.out


def make_job(request: Request, spec: ModelSpec, devices: int) -> Job:
    """Validate a request for a model and a number of devices; raise ValueError naming the value and the remedy."""
    _refuse_autocast()
    _check_kinds(request)
    solver = solver_of(request)
    mode = _mode(request, devices, solver.grid.steps, solver.adds_noise)
    labels = _labels(request.labels, spec)
    count = _count(request.count, labels)
    shape = _shape(request.shape, spec)
    kept = slots(solver, mode)
    if count * math.prod(shape) * 2 * kept > MAX_NUMBERS:
        raise ValueError(f"count {count} of shape {list(shape)} with {kept} drafts kept is too large; ask for fewer")
    cond = _cond(request, spec)
    if labels is not None:
        cond["labels"] = labels
    seed = check_whole("seed", request.seed)
    noise = _given("noise", request.noise, (count, *shape))
    start = _start(request, solver, _noise(seed, count, shape) if noise is None else noise.detach())
    out = _given("out", request.out, (count, *shape))
    return Job(solver, mode, start, cond, lambda k: _noise(_seed_of(seed, k), count, shape), request.residuals, out)


def _check_kinds(request: Request) -> None:
    """Raise ValueError for options of a kind that would otherwise fail where they are used."""
    if not isinstance(request.mode, (str, Mode)):
        raise ValueError(
            f"mode is {request.mode!r:.80}; give one of {', '.join(MODE_NAMES)}, or a drp.sampling.modes.Mode"
        )
    for name in ("grid", "solver_options", "cond"):
        if not isinstance(getattr(request, name), Mapping):
            raise ValueError(f"{name} is {getattr(request, name)!r:.80}; give a mapping of names to values")
    if request.callback is not None and not callable(request.callback):
        raise ValueError(f"callback is {request.callback!r:.80}; give a function of the step and the state")


def _refuse_autocast() -> None:
    """Raise ValueError if torch.autocast is active in this thread, since it does not apply to worker processes."""
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            raise ValueError(
                f"torch.autocast({kind!r}) is on in this thread, and does not reach the denoiser in its worker "
                "processes; put it into the denoiser's own code, and leave it here"
            )


def solver_of(request: Request) -> Solver:
    """Return the solver that a request names or is; raise ValueError for options that it cannot have."""
    if not isinstance(request.solver, (str, Solver)):
        raise ValueError(
            f"solver is {request.solver!r:.80}; give one of {', '.join(SOLVER_NAMES)}, or a drp.sampling.solvers.Solver"
        )
    if not isinstance(request.solver, str):
        if request.grid or request.solver_options or request.strength != 1.0:
            raise ValueError(
                "grid, solver_options and strength apply to a solver's name; this solver is an object: set them there"
            )
        return request.solver
    steps = check_whole("steps", request.steps, 1, MAX_STEPS)
    strength = request.strength if request.image is not None else 1.0
    if request.image is None and request.strength != 1.0:
        raise ValueError(f"strength is {request.strength}, but there is no image to start from; give image")
    grid, options = request.grid, request.solver_options
    try:
        with np.errstate(all="ignore"):  # The resulting numbers are checked below.
            solver = make_solver(request.solver, steps, request.prediction_type, grid, options, strength)
    except (ArithmeticError, IndexError, TypeError) as error:
        raise ValueError(f"grid {dict(grid)!s:.200} and solver_options {dict(options)!s:.200}: {error}") from None
    own = solver.grid
    if own.steps > MAX_STEPS:  # Heun's method takes twice as many steps as requested.
        raise ValueError(f"steps is {steps}, of which {request.solver} makes {own.steps}; at most {MAX_STEPS}")
    numbers = np.concatenate((own.timesteps, own.alphas, own.sigmas, [own.start]))
    if not np.all(np.isfinite(numbers)) or np.max(np.abs(numbers)) > MAX_TIMESTEP:
        raise ValueError(
            f"grid {dict(grid)!s:.200} leads to timesteps or noise levels that are not finite numbers within "
            f"{MAX_TIMESTEP:g}; leave out what is extreme in it"
        )
    return solver


def _start(request: Request, solver: Solver, noise: Tensor) -> Tensor:
    """Return the state at index 0: noise, or the image with noise added."""
    if request.image is None:
        return noise * solver.grid.start if solver.grid.start != 1.0 else noise
    image = request.image
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.shape != noise.shape:
        got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image is {got}; give floating point numbers of shape {list(noise.shape)}, one per sample")
    alpha, sigma = solver.at(0)
    return alpha * image.detach().to(noise) + sigma * noise


def _given(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """Check a tensor of the caller's that is used without a copy, so its dtype, shape and layout must match exactly."""
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{name} is a {type(tensor).__name__}; give a tensor, torch.from_dlpack makes one of most things"
        )
    dense = tensor.layout == torch.strided and tensor.is_contiguous()
    if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_cpu or not dense:
        got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}{'' if dense else ', not contiguous'}"
        raise ValueError(f"{name} is {got}; give torch.float32 {list(shape)} on cpu, contiguous")
    return tensor


def _seed_of(seed: int, k: int) -> int:
    """Return the seed of the noise that step k adds. It depends on the index only, not on the mode or on timing."""
    return int(np.random.SeedSequence([seed, k]).generate_state(1, np.uint64)[0]) >> 1


def _number(name: str, value: Any, low: float, high: float) -> float:
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not low <= number <= high:
        raise ValueError(f"{name} is {value!r:.80}; give a number, {low:g} to {high:g}")
    return number


def _mode(request: Request, devices: int, steps: int, noise: bool) -> Mode:
    tolerance = _number("tolerance", request.tolerance, 0, math.inf)
    check_tolerance(request.mode, tolerance)
    if isinstance(request.mode, str):
        limited = request.drafts is not None
        drafts = check_whole("drafts", request.drafts, 1, MAX_DRAFTS) if limited else min(devices, MAX_DRAFTS)
        stride = request.stride
        if stride is not None:
            stride = _number("stride", stride, 1, MAX_STEPS)
        mode: Mode
        if request.target_speedup is not None or request.target_rounds is not None:
            mode = _target(request, drafts, noise)
        else:
            mode = make_mode(request.mode, drafts, tolerance, request.rule, stride, _offsets(request.offsets), noise)
        if isinstance(mode, Window) and steps / mode.stride * drafts > MAX_EVALUATIONS:
            raise ValueError(
                f"stride is {mode.stride:g} with {drafts} drafts and {steps} steps, more than {MAX_EVALUATIONS} "
                "evaluations; move on by more steps, or take fewer drafts"
            )
    elif any(getattr(request, given) is not None for given in OF_NAMED_MODES):
        raise ValueError(
            f"mode is {request.mode}, an object that defines its own drafts and their number; leave out "
            f"{', '.join(OF_NAMED_MODES)}"
        )
    else:
        mode = request.mode
    if check_whole("sweeps", request.sweeps, 0, MAX_EVALUATIONS // steps - 1):
        mode = PicardSweeps(mode, request.sweeps)
    if check_whole("warmup", request.warmup, 0, MAX_STEPS):
        mode = Warmup(mode, request.warmup)
    if mode.width > MAX_DRAFTS:
        raise ValueError(f"{mode.width} drafts per round; at most {MAX_DRAFTS}")
    return mode.for_steps(steps)


def _target(request: Request, drafts: int, noise: bool) -> TargetWindow:
    """Return the window that is to reach the requested speed-up or number of rounds."""
    for name in ("stride", "offsets"):
        if getattr(request, name) is not None:
            raise ValueError(
                f"{name} is {getattr(request, name)!r}, but target_... chooses that; leave one of them out"
            )
    rounds, speedup = request.target_rounds, request.target_speedup
    if request.mode != "window":
        given = "target_speedup" if rounds is None else "target_rounds"
        raise ValueError(f"{given} chooses a window, and mode is {request.mode!r}; leave one of them out")
    if rounds is not None:
        rounds = check_whole("target_rounds", rounds, 1, MAX_STEPS)
    if speedup is not None:
        speedup = _number("target_speedup", speedup, 1, MAX_STEPS)
    rule = None if request.rule is None else find_rule(request.rule)
    return TargetWindow(drafts, rounds, speedup, rule, noise)


def _offsets(offsets: Any) -> str | tuple[int, ...] | None:
    """Validate offsets for make_mode; each must be a whole number of at least 1."""
    if offsets is None or isinstance(offsets, str):
        return offsets
    if not isinstance(offsets, Sequence) or len(offsets) > MAX_DRAFTS:
        raise ValueError(f"offsets are {offsets!r:.80}; give a name, or a whole number for each draft")
    return tuple(check_whole("an offset", offset, 1, MAX_STEPS) for offset in offsets)


def _labels(labels: Sequence[int] | Tensor | None, spec: ModelSpec) -> Tensor | None:
    if labels is None:
        if spec.classes is not None:
            raise ValueError(f"labels are missing; this model needs one per sample, from 0 to {spec.classes - 1}")
        return None
    try:
        given = torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels {labels!r:.80} are not whole numbers: {error}") from None
    if given.dim() == 1 and len(given) > MAX_SAMPLES:
        raise ValueError(f"there are {len(given)} labels; at most {MAX_SAMPLES} in one run, ask for fewer")
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
    count = check_whole("count", count, 1, MAX_SAMPLES)
    if labels is not None and len(labels) != count:
        raise ValueError(f"count is {count}, but there are {len(labels)} labels; give one per sample")
    return count


def _shape(shape: Sequence[int] | None, spec: ModelSpec) -> tuple[int, ...]:
    if shape is None:
        if spec.sample_shape is None:
            raise ValueError("shape is missing; this model does not say the shape of a sample, so give it")
        return spec.sample_shape
    if isinstance(shape, str) or not isinstance(shape, Iterable):
        raise ValueError(f"shape is {shape!r:.80}; give a list of sizes, such as [4, 64, 64]")
    own = tuple(check_whole("shape", n) for n in shape)
    if len(own) > 15 or 0 in own:
        raise ValueError(f"shape is {list(own)}; give 0 to 15 sizes of 1 or more")
    if spec.sample_shape is not None and own != spec.sample_shape:
        raise ValueError(f"shape is {list(own)}, but this model's samples are {list(spec.sample_shape)}")
    return own


def _cond(request: Request, spec: ModelSpec) -> dict[str, Tensor]:
    cond: dict[str, Tensor] = {}
    for name, value in request.cond.items():
        if not isinstance(name, str) or not 0 < len(name) <= 200:
            raise ValueError(f"cond has the name {name!r:.80}; give names of 1 to 200 characters")
        if not isinstance(value, Tensor):
            raise ValueError(f"cond[{name!r:.80}] is a {type(value).__name__}; cond holds tensors by name")
        if not is_text(name):
            raise ValueError(f"cond[{name!r:.80}]: the name contains lone surrogates, which are not characters")
        if value.is_meta or value.is_nested:
            raise ValueError(f"cond[{name!r}] is a nested tensor, or one without values; give a dense tensor")
        if value.dim() > MAX_DIMENSIONS or value.dtype not in NAMES or value.layout != torch.strided:
            raise ValueError(
                f"cond[{name!r}] is {value.dtype} with {value.dim()} sizes, {value.layout}; give a dense tensor of one "
                f"of {', '.join(DTYPES)} with {MAX_DIMENSIONS} sizes at most"
            )
        if name in ("labels", "guidance"):
            raise ValueError(f"cond[{name!r}]: {name} is a separate argument; give it there")
        cond[name] = value
    if len(cond) > 60:
        raise ValueError(f"cond holds {len(cond)} tensors; at most 60")
    guidance = spec.guidance if request.guidance is None else request.guidance
    if guidance is not None:
        scale = _number("guidance", guidance, -MAX_GUIDANCE, MAX_GUIDANCE)
        cond["guidance"] = torch.tensor(scale, dtype=torch.float32, device="cpu")
    return cond


def _noise(seed: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Draw noise [count, *shape] sample by sample, so that a sample's noise does not depend on the count."""
    generator = torch.Generator("cpu").manual_seed(seed)
    samples = torch.empty((count, *shape), dtype=torch.float32, device="cpu")
    for sample in samples:
        sample.normal_(generator=generator)
    return samples
