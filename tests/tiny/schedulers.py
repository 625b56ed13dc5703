"""Schedulers of diffusers that pipelines draft with, and their flags that bear on whether drafts converge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from tests.tiny.builders import BETAS

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def _of(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(**options)


def _betas(name: str, **options: Any) -> Callable[[], Any]:
    return _of(name, **BETAS, **options)


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DDIM": _betas("DDIMScheduler", clip_sample=False),
    "DDIM, clip_sample": _betas("DDIMScheduler"),
    "DDIM, thresholding": _betas("DDIMScheduler", clip_sample=False, thresholding=True),
    "DDPM": _betas("DDPMScheduler", clip_sample=False),
    "DDPM, clip_sample": _betas("DDPMScheduler"),
    "PNDM": _betas("PNDMScheduler", skip_prk_steps=True),
    "Euler": _betas("EulerDiscreteScheduler"),
    "Euler, karras": _betas("EulerDiscreteScheduler", use_karras_sigmas=True),
    "Euler ancestral": _betas("EulerAncestralDiscreteScheduler"),
    "Heun": _betas("HeunDiscreteScheduler"),
    "Heun, clip_sample": _betas("HeunDiscreteScheduler", clip_sample=True),
    "LMS": _betas("LMSDiscreteScheduler"),
    "KDPM2": _betas("KDPM2DiscreteScheduler"),
    "KDPM2 ancestral": _betas("KDPM2AncestralDiscreteScheduler"),
    "DPM-Solver++ 2M": _betas("DPMSolverMultistepScheduler"),
    "DPM-Solver++ 2M, thresholding": _betas("DPMSolverMultistepScheduler", thresholding=True),
    "DPM-Solver++ 2M, SDE": _betas("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    "DPM-Solver++, single step": _betas("DPMSolverSinglestepScheduler", lower_order_final=True),
    "DPM-Solver, SDE by Brownian tree": _betas("DPMSolverSDEScheduler", noise_sampler_seed=0),
    "DEIS": _betas("DEISMultistepScheduler"),
    "UniPC": _betas("UniPCMultistepScheduler"),
    "SA-Solver": _betas("SASolverScheduler"),
    "IPNDM": _of("IPNDMScheduler"),
    "LCM": _betas("LCMScheduler", original_inference_steps=200),  # as many steps as are measured, and more
    "TCD": _betas("TCDScheduler", original_inference_steps=200),
    "EDM Euler": _of("EDMEulerScheduler"),
    "EDM DPM-Solver++": _of("EDMDPMSolverMultistepScheduler"),
    "flow matching, Euler": _of("FlowMatchEulerDiscreteScheduler", shift=3.0),
    "flow matching, Euler, stochastic": _of("FlowMatchEulerDiscreteScheduler", shift=3.0, stochastic_sampling=True),
    "flow matching, Heun": _of("FlowMatchHeunDiscreteScheduler", shift=3.0),
    "flow matching, LCM": _of("FlowMatchLCMScheduler", shift=3.0),
    "flow matching, UniPC": _of("UniPCMultistepScheduler", **FLOW),
    "flow matching, DPM-Solver++": _of("DPMSolverMultistepScheduler", **FLOW),
}


class Velocity(nn.Module):
    """A model of flow matching made of a model of noise: x = (1 - s) data + s noise, at t = 1000 s."""

    ratios: Tensor

    def __init__(self, inner: nn.Module, bars: Tensor) -> None:
        super().__init__()
        self.inner, self.label = inner, inner.label
        self.register_buffer("ratios", ((1 - bars) / bars).sqrt())  # noise over signal at each of the timesteps

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return noise - data. Beyond the noise that the model was trained with its estimate of the data is kept."""
        sigma = (t / 1000).clamp(1e-4, 1 - 1e-4)[:, None, None, None]
        ratio = sigma / (1 - sigma)
        step = torch.searchsorted(self.ratios, ratio.flatten()).clamp_max(len(self.ratios) - 1)
        scaled = x / ((1 + ratio**2).sqrt() * (1 - sigma))
        noise = self.inner(scaled, step.to(x.dtype), labels)
        known = ratio.clamp_max(self.ratios[-1])
        data = scaled * (1 + known**2).sqrt() - known * noise
        return torch.where(sigma < 0.5, (noise - x) / (1 - sigma), (x - data) / sigma)
