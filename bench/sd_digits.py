"""The digits model in the place of a Stable Diffusion U-Net: a trained network that such pipelines take."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ConfigMixin, DDIMParallelScheduler, ModelMixin, StableDiffusionPipeline
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file
from torch import Tensor

from drp.models.digits import WEIGHTS
from drp.models.unet import UNet

NOTHING = 10
"""The class of no class."""


class DigitsUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # they have no types
    """Takes `encoder_hidden_states` [B, 1, 1], whose number is the class; the negative prompt's is `NOTHING`."""

    @register_to_config  # type: ignore[untyped-decorator]  # nor has it
    def __init__(self, in_channels: int = 1, sample_size: int = 28, time_cond_proj_dim: int | None = None) -> None:
        super().__init__()
        self.unet = UNet(classes=NOTHING)
        self.unet.load_state_dict(load_file(WEIGHTS))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        """Return the noise in `sample` [B, 1, 28, 28]; `timestep` is one for all, or [B]."""
        labels = encoder_hidden_states[:, 0, 0].long()
        return (self.unet(sample, timestep.expand(len(sample)), labels),)


def pipeline(kind: type = StableDiffusionPipeline) -> Any:
    """Return a pipeline of this kind with the trained model, and DDIM that ParaDiGMS can run in parallel."""
    vae = AutoencoderKL(
        block_out_channels=[8, 8],
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=1,
    )
    scheduler = DDIMParallelScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    names = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    made = kind(
        vae=vae,
        unet=DigitsUNet().eval(),
        scheduler=scheduler,
        requires_safety_checker=False,
        **dict.fromkeys(names),
    )
    made.set_progress_bar_config(disable=True)
    return made


def arguments(labels: Tensor, steps: int) -> dict[str, Any]:
    """Return what such a pipeline is called with; latents are drawn from seed 0."""
    return {
        "prompt_embeds": labels.float()[:, None, None],
        "negative_prompt_embeds": torch.full((len(labels), 1, 1), float(NOTHING)),
        "guidance_scale": 2.0,
        "num_inference_steps": steps,
        "height": 56,
        "width": 56,
        "output_type": "latent",
        "latents": torch.randn(len(labels), 1, 28, 28, generator=torch.Generator().manual_seed(0)),
    }
