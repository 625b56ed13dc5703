"""ComfyUI for tests of its node: the real one, of a checkout that COMFYUI_PATH names, or else a double.

The double has what the node uses: samplers with a function, `KSAMPLER`, which calls it with a model, noise levels and
callbacks, the model that holds a guider, and the check for interrupts. ComfyUI itself is on no registry, and it has
another licence than this project.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny.builders import normal

PATH = os.environ.get("COMFYUI_PATH", "")
FOLDER = Path(__file__).parents[1] / "integrations" / "comfyui"
SIGMAS = [14.6, 0.03]

Callback = Callable[[int, Tensor, Tensor, int], None]


class EPS:
    """Says that a network predicts the noise; latents are data + sigma noise."""

    @staticmethod
    def denoised(x: Tensor, sigma: Tensor, output: Tensor) -> Tensor:
        return x - sigma * output


class CONST(EPS):
    """Says that a network predicts the velocity; latents are (1 - sigma) data + sigma noise."""


class Network(nn.Module):
    """A small network: x [B, 4, H, W], sigma [B], cond [B, 4] -> denoised latents."""

    def __init__(self, flow: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model_sampling = CONST() if flow else EPS()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.requires_grad_(False)
        self.rows: list[int] = []

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor) -> Tensor:
        self.rows.append(len(x))
        level = sigma[:, None, None, None]
        scaled = x if isinstance(self.model_sampling, CONST) else x / (level**2 + 1).sqrt()
        hidden = self.first(scaled + cond[:, :, None, None]) + level.log1p()
        return self.model_sampling.denoised(x, level, torch.tanh(self.second(torch.tanh(hidden))))


class Guider:
    """Guidance from the conditions of `conds` that are active at the first noise level of a batch."""

    def __init__(self, network: Network, conds: dict[str, list[dict[str, Any]]]) -> None:
        self.inner_model, self.conds, self.cfg = network, conds, 3.0

    def __call__(self, x: Tensor, sigma: Tensor, model_options: Any = None, seed: int | None = None) -> Tensor:
        positive, negative = (self._mean(x, sigma, self.conds[name]) for name in ("positive", "negative"))
        return negative + self.cfg * (positive - negative)

    def _mean(self, x: Tensor, sigma: Tensor, conds: list[dict[str, Any]]) -> Tensor:
        level = float(sigma[0])
        active = [c for c in conds if c.get("timestep_end", 0.0) <= level <= c.get("timestep_start", 1e9)]
        made = [self.inner_model(x, sigma, cond["cond"].expand(len(x), -1)) for cond in active]
        return torch.stack(made).mean(0)


class Inpainting:
    """What a sampler function takes for the model."""

    def __init__(self, guider: Guider, noise: Tensor, latent_image: Tensor) -> None:
        self.inner_model, self.noise, self.latent_image = guider, noise, latent_image

    def __call__(
        self, x: Tensor, sigma: Tensor, denoise_mask: Tensor | None, model_options: Any = None, seed: int | None = None
    ) -> Tensor:
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options, seed)
        noisy = self.latent_image + sigma[:, None, None, None] * self.noise
        out = self.inner_model(x * denoise_mask + noisy * (1 - denoise_mask), sigma, model_options, seed)
        return out * denoise_mask + self.latent_image * (1 - denoise_mask)


class KSAMPLER:
    """A sampler: a function with its options."""

    def __init__(
        self,
        sampler_function: Callable[..., Tensor],
        extra_options: dict[str, Any] | None = None,
        inpaint_options: dict[str, Any] | None = None,
    ) -> None:
        self.sampler_function = sampler_function
        self.extra_options, self.inpaint_options = extra_options or {}, inpaint_options or {}

    def sample(
        self,
        guider: Guider,
        sigmas: Tensor,
        noise: Tensor,
        latent_image: Tensor,
        denoise_mask: Tensor | None,
        callback: Callback | None,
    ) -> Tensor:
        flow = isinstance(guider.inner_model.model_sampling, CONST)
        x = noise * sigmas[0] + latent_image * (1 - sigmas[0] if flow else 1)

        def told(step: dict[str, Any]) -> None:
            if callback is not None:
                callback(step["i"], step["denoised"], step["x"], len(sigmas) - 1)

        extra = {"model_options": {}, "seed": 3, "denoise_mask": denoise_mask}
        model = Inpainting(guider, noise, latent_image)
        return self.sampler_function(
            model, x, sigmas, extra_args=extra, callback=told, disable=True, **self.extra_options
        )


def _each(
    x: Tensor, sigmas: Tensor, callback: Any, step: Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> Tensor:
    for i in range(len(sigmas) - 1):
        level, after = sigmas[i] * x.new_ones(len(x)), sigmas[i + 1] * x.new_ones(len(x))
        before, (x, denoised) = x, step(i, x, level, after)
        if callback:
            callback({"i": i, "denoised": denoised, "x": before, "sigma": sigmas[i]})
    return x


def sample_euler(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Tensor:
    def step(i: int, x: Tensor, sigma: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        denoised = model(x, sigma, **extra_args)
        return x + (x - denoised) / sigma[0] * (after[0] - sigma[0]), denoised

    return _each(x, sigmas, callback, step)


def sample_heun(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Tensor:
    def step(i: int, x: Tensor, sigma: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        denoised = model(x, sigma, **extra_args)
        slope, length = (x - denoised) / sigma[0], after[0] - sigma[0]
        ahead = x + slope * length
        if float(after[0]) == 0:
            return ahead, denoised
        return x + (slope + (ahead - model(ahead, after, **extra_args)) / after[0]) * (length / 2), denoised

    return _each(x, sigmas, callback, step)


def sample_dpmpp_2m(
    model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> Tensor:
    """Adams-Bashforth of order 2 in sigma, which looks back on the step before."""
    slopes: list[Tensor] = []

    def step(i: int, x: Tensor, sigma: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        denoised = model(x, sigma, **extra_args)
        slopes.append((x - denoised) / sigma[0])
        slope = slopes[-1] if len(slopes) < 2 else 1.5 * slopes[-1] - 0.5 * slopes[-2]
        return x + slope * (after[0] - sigma[0]), denoised

    return _each(x, sigmas, callback, step)


def sample_euler_ancestral(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Any = None,
    callback: Any = None,
    disable: Any = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: Any = None,
) -> Tensor:
    generator = torch.Generator().manual_seed(extra_args["seed"])

    def step(i: int, x: Tensor, sigma: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        denoised = model(x, sigma, **extra_args)
        up = eta * after[0] * (1 - (after[0] / sigma[0]) ** 2).sqrt()
        down = (after[0] ** 2 - up**2).sqrt()
        noise = torch.randn(x.shape, generator=generator)
        return x + (x - denoised) / sigma[0] * (down - sigma[0]) + s_noise * up * noise, denoised

    return _each(x, sigmas, callback, step)


def _module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(contents)
    return made


def _double() -> dict[str, ModuleType]:
    functions = {f.__name__: f for f in (sample_euler, sample_heun, sample_dpmpp_2m, sample_euler_ancestral)}
    management = _module("comfy.model_management", throw_exception_if_processing_interrupted=lambda: None)
    samplers = _module("comfy.samplers", KSAMPLER=KSAMPLER, functions=functions)
    whole = _module("comfy", samplers=samplers, model_management=management)
    return {"comfy": whole, "comfy.samplers": samplers, "comfy.model_management": management}


class Comfy:
    """ComfyUI, or the double, with a small network."""

    def __init__(self) -> None:
        if PATH:
            from tests import comfyui_real

            self.real: Any = comfyui_real
            comfyui_real.prepare(PATH)
        else:
            self.real = None
            sys.modules.update(_double())
        name = "drp_comfyui_node"
        spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # as ComfyUI does with the folders in custom_nodes
        spec.loader.exec_module(module)
        self.node = module.NODE_CLASS_MAPPINGS["DraftAndRefine"]()
        self.module = sys.modules[f"{name}.node"]
        self.management = sys.modules["comfy.model_management"]

    def sampler(self, name: str, **options: Any) -> Any:
        """Return one of ComfyUI's samplers, with options of its own."""
        samplers = sys.modules["comfy.samplers"]
        if self.real:
            return samplers.ksampler(name, options)
        return KSAMPLER(samplers.functions[f"sample_{name}"], options)

    def model(self, flow: bool = False) -> Any:
        """Return a small model."""
        return self.real.model(flow) if self.real else Network(flow)

    def sample(
        self,
        sampler: Any,
        model: Any,
        steps: int = 24,
        batch: int = 1,
        *,
        begins: float | None = None,
        mask: Tensor | None = None,
        callback: Callback | None = None,
        **cond: Any,
    ) -> Tensor:
        """Sample with guidance; `begins`: the positive condition gets a second one below that noise level."""
        noise = normal(batch, 4, 8, 8)
        latent = normal(batch, 4, 8, 8, seed=5) if mask is not None else torch.zeros(batch, 4, 8, 8)
        if self.real:
            made: Tensor = self.real.sample(sampler, model, steps, noise, latent, begins, mask, callback, cond)
            return made
        flow = isinstance(model.model_sampling, CONST)
        high, low = (1.0, 0.02) if flow else SIGMAS
        sigmas = torch.cat([torch.linspace(high, low, steps), torch.zeros(1)])
        positive = [{"cond": normal(1, 4, seed=2), **cond}]
        if begins is not None:
            positive.append({"cond": normal(1, 4, seed=4), "timestep_start": begins})
        guider = Guider(model, {"positive": positive, "negative": [{"cond": normal(1, 4, seed=3)}]})
        return sampler.sample(guider, sigmas, noise, latent, mask, callback)  # type: ignore[no-any-return]


def spy(module: Any, monkeypatch: Any) -> list[Any]:
    """Return a list that every drafted run is added to."""
    runs: list[Any] = []
    original = module.DraftedRun

    def make(*args: Any, **kwargs: Any) -> Any:
        runs.append(original(*args, **kwargs))
        return runs[-1]

    monkeypatch.setattr(module, "DraftedRun", make)
    return runs


CONTROL = SimpleNamespace(timestep_range=None, previous_controlnet=None)
"""Stands in the place of a ControlNet among the conditions."""
