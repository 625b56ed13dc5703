"""The trained model of digits as a diffusers pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import BaseOutput
from safetensors.torch import load_file
from torch import Tensor, nn

from drp.models.digits import WEIGHTS, Digits


@dataclass
class DigitsOutput(BaseOutput):  # type: ignore[misc]  # it has no types
    """`images` is float32 [B, 1, 28, 28], about [-1, 1]."""

    images: Tensor


class DigitsPipeline(DiffusionPipeline):  # type: ignore[misc]  # nor has this
    """Draws handwritten digits by class, with classifier-free guidance."""

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        labels: Sequence[int],
        num_inference_steps: int = 48,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
    ) -> DigitsOutput:
        """Draw a digit for each label, from noise or from `latents` [B, 1, 28, 28]."""
        self.scheduler.set_timesteps(num_inference_steps)
        noise = latents if latents is not None else torch.randn(len(labels), 1, 28, 28, generator=generator)
        x = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)  # Schedulers of flow matching have none,
        scale = getattr(self.scheduler, "scale_model_input", lambda x, _: x)  # and do not scale.
        asked = torch.tensor(list(labels))
        nothing = torch.full_like(asked, self.unet.label.num_embeddings - 1)
        both = torch.cat([nothing, asked])
        self._num_timesteps = len(self.scheduler.timesteps)
        drawn = "generator" in inspect.signature(self.scheduler.step).parameters
        options = (
            {"generator": generator} if drawn else {}
        )  # Some schedulers add no noise, or draw it from a generator of their own.
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_input = scale(torch.cat([x] * 2), t)
            without, with_label = self.unet(model_input, t.expand(len(both)), both).chunk(2)
            noise = without + guidance_scale * (with_label - without)
            x = self.scheduler.step(noise, t, x, **options).prev_sample
            if callback_on_step_end is not None:
                x = callback_on_step_end(self, i, t, {"latents": x}).pop("latents", x)
        return DigitsOutput(images=x)


def digits_pipeline(scheduler: Any = None) -> DigitsPipeline:
    """Return the pipeline with the trained weights, by default with DDIM on the grid of `drp.sample`."""
    model = Digits()
    model.unet.load_state_dict(load_file(WEIGHTS))
    scheduler = scheduler or DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    return DigitsPipeline(model.unet.eval().requires_grad_(False), scheduler)
