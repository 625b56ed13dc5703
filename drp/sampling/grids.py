"""Grids: the timesteps of a run, and how much signal and noise a state has at each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from drp.sampling.schedules import KARRAS_RHO, TRAINING_STEPS, Float64s, alpha_bars, spread

FAMILIES = ("ddim", "ddpm", "pndm", "dpm", "euler", "heun")
SPACINGS = ("leading", "linspace", "trailing")

LEAST_ALPHA_BAR = 2.0**-24
"""The minimum of alpha-bar where a solver works in sigma = sqrt((1 - alpha-bar) / alpha-bar), which must be finite."""


@dataclass(frozen=True)
class Grid:
    """The N steps of a run, at indices 0..N.

    `timesteps` are t_0 > ... > t_{N-1}, float64 [N]: where the denoiser is evaluated. `alphas` and `sigmas` are
    float64 [N + 1]: the state at index k is `alphas[k] * data + sigmas[k] * noise`. Index N is the sample itself.

    `start` is the factor of the initial noise. `landings`, float64 [N, 2], are the (alpha, sigma) at the end of step k,
    where a scheduler does not take them from index k + 1.
    """

    timesteps: Float64s
    alphas: Float64s
    sigmas: Float64s
    start: float = 1.0
    landings: Float64s | None = None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def lambdas(self) -> Float64s:
        """log(alpha / sigma) at 0..N: half the log of the signal-to-noise ratio; infinite without noise or signal."""
        with np.errstate(divide="ignore"):
            return np.log(self.alphas) - np.log(self.sigmas)

    def landing(self, k: int) -> tuple[float, float]:
        if self.landings is not None:
            return float(self.landings[k, 0]), float(self.landings[k, 1])
        return float(self.alphas[k + 1]), float(self.sigmas[k + 1])

    def after(self, first: int) -> Grid:
        """Return the grid from index `first` on, for a run that starts in the middle (image to image)."""
        if not 0 <= first < self.steps:
            raise ValueError(f"first is {first}; this grid has the steps 0 to {self.steps - 1}")
        landings = None if self.landings is None else self.landings[first:]
        return Grid(self.timesteps[first:], self.alphas[first:], self.sigmas[first:], self.start, landings)


def scaled_linear(steps: int) -> Grid:
    """Return `steps` timesteps spread evenly over the scaled-linear schedule, the last training timestep first.

    The spacing is "trailing" (Lin et al. 2024, table 2); the end is free of noise: alpha_N = 1, sigma_N = 0.
    """
    return make_grid(steps, family="ddpm")


def make_grid(
    steps: int,
    *,
    family: str = "ddim",
    schedule: str | Float64s = "scaled_linear",
    zero_snr: bool = False,
    spacing: str = "trailing",
    offset: int = 0,
    timesteps: Sequence[float] | None = None,
    sigmas: str | Sequence[float] | None = None,
    rho: float = KARRAS_RHO,
    end: str = "zero",
) -> Grid:
    """Return a grid on a schedule of training timesteps.

    family: the conventions to follow where diffusers' schedulers differ (docs/schedulers.md): "ddim", "ddpm", "pndm",
        "dpm" (also DEIS and UniPC), "euler" (also linear multistep) or "heun" (two evaluations per step).
    schedule: "linear", "scaled_linear", "cosine", or alpha-bar of every training timestep, float64 [T].
    zero_snr: rescale it so that the last training timestep holds no signal.
    spacing: "leading", "linspace" or "trailing"; `offset` is added to leading timesteps.
    timesteps: alternatively, `steps` decreasing numbers below T.
    sigmas: noise levels sqrt((1 - alpha-bar) / alpha-bar): "karras", "exponential", "beta", or `steps` decreasing
        numbers. The timesteps are then those of the schedule at these levels.
    rho: for "karras", which spaces sigma^(1/rho) evenly; a lower rho spends more steps at high noise levels.
    end: "zero", free of noise, or "sigma_min", the noise of the first training timestep.
    """
    bars = alpha_bars(schedule, zero_snr)
    if not 1 <= steps <= len(bars):
        raise ValueError(f"steps is {steps}; choose 1 to {len(bars)}, the number of training timesteps")
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    if end not in ("zero", "sigma_min"):
        raise ValueError(f"end is {end!r}; choose 'zero' or 'sigma_min'")
    by_index = family in ("ddim", "ddpm", "pndm")
    if by_index and sigmas is not None:
        raise ValueError(f"sigmas is {sigmas!r:.80}, which family {family!r} does not take; choose a solver in sigmas")
    if rho != KARRAS_RHO and not (isinstance(sigmas, str) and sigmas == "karras" and 0 < rho < math.inf):
        raise ValueError(f"rho is {rho}; give a number above 0, and sigmas='karras' with it")
    last_bar = 1.0 if end == "zero" else float(bars[0])
    t = _falling("timesteps", timesteps, steps) if timesteps is not None else _spaced(steps, len(bars), spacing, family)
    t = t + offset if spacing == "leading" and timesteps is None else t.copy()
    if not (t[-1] >= 0 and t[0] <= len(bars) - 1):
        raise ValueError(f"timesteps run from {t[0]:g} to {t[-1]:g}; they must lie within 0 and {len(bars) - 1}")
    if by_index:
        return _by_index(t, bars, last_bar, family, len(bars) // steps)
    noise, t = _noise_levels(t, np.maximum(bars, LEAST_ALPHA_BAR) if zero_snr else bars, sigmas, rho, family, schedule)
    ended = np.append(noise, math.sqrt((1 - last_bar) / last_bar))
    alphas = 1 / np.sqrt(ended**2 + 1)
    grid = Grid(t, alphas, ended * alphas)
    if family == "dpm":
        return grid
    grid = replace(grid, start=1.0 if spacing == "leading" else float(grid.sigmas[0]))
    return _doubled(grid) if family == "heun" else grid


def _spaced(steps: int, training: int, spacing: str, family: str) -> Float64s:
    """Space timesteps; families differ in whether they include an end point, and in rounding."""
    extra = 1 if family == "dpm" else 0  # One more point: the last is the end, and not evaluated.
    match spacing:
        case "linspace":
            t = np.linspace(0, training - 1, steps + extra)[::-1][:steps]
            return t if family in ("euler", "heun") else np.round(t)
        case "leading":
            return np.arange(steps + extra, dtype=np.float64)[::-1][:steps] * (training // (steps + extra))
        case "trailing":
            return np.round(np.arange(training, 0, -training / steps)[:steps]) - 1
    raise ValueError(f"unknown spacing {spacing!r}; choose one of {', '.join(SPACINGS)}")


def _falling(name: str, values: Sequence[float], steps: int) -> Float64s:
    given = np.asarray(values, dtype=np.float64)
    if given.shape != (steps,) or not np.all(np.isfinite(given)) or not np.all(np.diff(given) < 0):
        raise ValueError(f"{name} must be {steps} decreasing numbers, one for each step; got {values!r:.200}")
    return given


def _by_index(t: Float64s, bars: Float64s, last_bar: float, family: str, stride: int) -> Grid:
    """Take alpha-bar at whole timesteps. Steps of DDIM and PNDM end a fixed stride below, not at the next timestep."""
    if np.any(t != np.round(t)):
        raise ValueError(f"timesteps hold {t[t != np.round(t)][0]:g}; this solver takes whole training timesteps")
    index = t.astype(np.int64)
    before = index - stride
    if family == "pndm":  # The second timestep is evaluated twice, because the first step is Heun's.
        index = np.concatenate([index[:2], index[1:]]) if len(index) > 1 else index
        before = np.concatenate([before[:1], index[1:2], before[1:]]) if len(before) > 1 else before
    bar = np.append(bars[index], last_bar)
    landed = bar[1:] if family == "ddpm" else np.where(before >= 0, bars[np.maximum(before, 0)], last_bar)
    # Landings on the grid itself need no table; the last landing is the end of the grid.
    bar[-1] = landed[-1]
    landings = None if np.array_equal(landed, bar[1:]) else np.stack([np.sqrt(landed), np.sqrt(1 - landed)], axis=1)
    return Grid(index.astype(np.float64), np.sqrt(bar), np.sqrt(1 - bar), landings=landings)


def _noise_levels(
    t: Float64s,
    bars: Float64s,
    sigmas: str | Sequence[float] | None,
    rho: float,
    family: str,
    schedule: str | Float64s,
) -> tuple[Float64s, Float64s]:
    """Return noise levels and their timesteps."""
    training = np.sqrt((1 - bars) / bars)
    between = np.asarray(np.interp(t, np.arange(len(bars)), training), dtype=np.float64)
    if sigmas is None:
        return between, t
    if isinstance(sigmas, str):
        ends = training[[0, -1]] if family == "dpm" else between[[-1, 0]]
        levels = spread(sigmas, float(ends[0]), float(ends[1]), len(t), rho)
    else:
        levels = _falling("sigmas", sigmas, len(t))
        if levels[-1] <= 0:
            raise ValueError(f"sigmas end at {levels[-1]:g}; give sigmas above 0; `end` sets the last noise level")
    at = np.asarray(np.interp(np.log(levels), np.log(training), np.arange(len(bars))), dtype=np.float64)
    if family == "dpm":  # These schedulers pass whole timesteps to the network: some round, others truncate.
        cosine = isinstance(schedule, str) and schedule == "cosine"
        at = np.round(at) if isinstance(sigmas, str) and sigmas == "karras" and not cosine else np.floor(at)
    return levels, at


def _doubled(grid: Grid) -> Grid:
    """Repeat each noise level but the first: it is evaluated at the end of a step and at the start of the next."""
    n = grid.steps
    twice = np.repeat(np.arange(n), 2)[1:]
    ends = np.append(twice, n)
    return Grid(grid.timesteps[twice], grid.alphas[ends], grid.sigmas[ends], grid.start)


def dynamic_mu(length: int, start: tuple[int, float] = (256, 0.5), end: tuple[int, float] = (4096, 1.15)) -> float:
    """Return mu of the dynamic shift for images of `length` tokens, on the line through two points (length, mu)."""
    return start[1] + (end[1] - start[1]) * (length - start[0]) / (end[0] - start[0])


def _check_flow(steps: int, shift: float, mu: float | None, shape: str, terminal: float | None, training: int) -> None:
    """Raise ValueError for an invalid argument of `flow_grid`."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; a grid has 1 step or more")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift is {shift}; give a number above 0, 1 for none")
    if shape not in ("exponential", "linear"):
        raise ValueError(f"shape is {shape!r}; choose 'exponential' or 'linear'")
    if not (isinstance(training, int) and training >= 1):
        raise ValueError(f"training is {training!r}; give the number of training timesteps, 1 or more, 1000 is usual")
    if terminal is not None and not (0 < terminal < 1 and steps > 1):
        raise ValueError(
            f"terminal is {terminal} with {steps} step(s); give a sigma between 0 and 1, and at least 2 steps"
        )
    if mu is not None and not (-20 <= mu <= 20 if shape == "exponential" else 0 < mu < math.inf):
        allowed = "from -20 to 20" if shape == "exponential" else "above 0"
        raise ValueError(f"mu is {mu}; give a number {allowed} for shape {shape!r}, 0.5 to 1.15 is usual")


def flow_grid(
    steps: int,
    *,
    family: str = "euler",
    shift: float = 1.0,
    mu: float | None = None,
    shape: str = "exponential",
    terminal: float | None = None,
    spacing: str | None = None,
    sigmas: Sequence[float] | None = None,
    training: int = TRAINING_STEPS,
) -> Grid:
    """Return a grid of flow matching, alpha = 1 - sigma (Esser et al. 2024); timesteps are sigma times `training`.

    family: "euler", "dpm" or "unipc": where diffusers' schedulers for these begin and end.
    shift: sigma becomes shift sigma / (1 + (shift - 1) sigma), which spends more steps at high noise levels.
    mu: alternatively, a dynamic shift of e^mu ("exponential") or mu ("linear" `shape`); see `dynamic_mu`.
    terminal: the last sigma before 0; the sigmas are stretched to end there.
    spacing: finally space the sigmas between their ends as "karras", "exponential" or "beta".
    sigmas: `steps` decreasing numbers, at most 1 and above 0, before shifting.
    """
    _check_flow(steps, shift, mu, shape, terminal, training)
    if mu is not None:
        shift = math.exp(mu) if shape == "exponential" else mu

    def shifted(s: Float64s) -> Float64s:
        return np.asarray(shift * s / (1 + (shift - 1) * s), dtype=np.float64)

    if sigmas is not None:
        values = _falling("sigmas", sigmas, steps)
        if not (values[-1] > 0 and values[0] <= 1):
            raise ValueError(f"sigmas run from {values[0]:g} to {values[-1]:g}; they must lie above 0, up to 1")
    elif family == "euler":
        low = np.array(1 / training)
        values = np.linspace(1, float(shifted(low) if mu is None else low), steps)
    elif family == "dpm":
        values = np.linspace(0, 1 - 1 / training, steps + 1)[::-1][:-1]
    elif family == "unipc":
        values = np.linspace(1, 1 / training, steps + 1)[:-1]
    else:
        raise ValueError(f"unknown family {family!r}; choose one of euler, dpm, unipc")
    values = shifted(values)
    if terminal is not None:
        values = 1 - (1 - values) * ((1 - terminal) / (1 - values[-1]))
    if spacing is not None:
        values = spread(spacing, float(values[-1]), float(values[0]), steps)
    if family == "unipc":  # It divides by alpha.
        values = np.append(min(values[0], 1 - 1e-6), values[1:])
    t = values * training
    ended = np.append(values, 0.0)
    return Grid(t if family == "euler" else np.floor(t), 1 - ended, ended)


def ipndm_grid(steps: int) -> Grid:
    """Return the grid of the improved pseudo-numerical method for v-diffusion; timesteps run from 1 to 0."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; a grid has 1 step or more")
    sigmas = np.sin(np.linspace(1, 0, steps + 1) * np.pi / 2) ** 2
    alphas = np.sqrt(1 - sigmas**2)
    return Grid(np.arctan2(sigmas, alphas)[:-1] / np.pi * 2, alphas, sigmas)
