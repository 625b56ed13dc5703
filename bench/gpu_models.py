"""Denoisers of a real size for bench.gpu: architectures from diffusers' configurations, weights at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drp import ModelSpec

GPU = "cuda"
"""Where weights are drawn: the current GPU. A core takes long for so many."""
UNET: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
"""Stable Diffusion 1.5's, for 512 x 512: 860 million numbers."""
SMALL_UNET: dict[str, Any] = UNET | {
    "sample_size": 16,
    "cross_attention_dim": 32,
    "block_out_channels": (32, 32, 64, 64),
}
DIT: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 64,
    "patch_size": 2,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
"""DiT-XL/2's, for 512 x 512: 675 million numbers."""
SMALL_DIT: dict[str, Any] = DIT | {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "sample_size": 16,
}


class _Bare(nn.Module):
    """One latent image at a time, [B, 4, size, size], under a condition of numbers at random."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.spec = ModelSpec(sample_shape=(4, size, size))

    def examples(self) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        """Return what a run will ask for."""
        assert self.spec.sample_shape is not None
        return [(torch.zeros(1, *self.spec.sample_shape), torch.zeros(1), {})]


class UNet(_Bare):
    """A conditional U-Net with 77 tokens of text."""

    text: Tensor

    def __init__(self, config: Mapping[str, Any], place: str) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__(config["sample_size"])
        torch.manual_seed(0)
        with torch.device(place):
            self.net: nn.Module = UNet2DConditionModel(**config)
            self.register_buffer("text", torch.randn(1, 77, config["cross_attention_dim"]))

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Predict."""
        out: Tensor = self.net(x, t, self.text.expand(len(x), -1, -1), return_dict=False)[0]
        return out


class DiT(_Bare):
    """A diffusion transformer with classes; of what it predicts, the variance is left out."""

    label: Tensor

    def __init__(self, config: Mapping[str, Any], place: str) -> None:
        from diffusers import DiTTransformer2DModel

        super().__init__(config["sample_size"])
        torch.manual_seed(0)
        with torch.device(place):
            self.net: nn.Module = DiTTransformer2DModel(**config)
        self.register_buffer("label", torch.tensor([7]))

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Predict."""
        out: Tensor = self.net(x, t, self.label.expand(len(x)), return_dict=False)[0]
        return out.chunk(2, dim=1)[0].contiguous()


class Tiny(_Bare):
    """Next to nothing, so that what is around it shows."""

    def __init__(self) -> None:
        super().__init__(64)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Predict."""
        return x * self.scale


def unet() -> UNet:
    """Return Stable Diffusion 1.5's U-Net."""
    return UNet(UNET, GPU)


def dit() -> DiT:
    """Return DiT-XL/2."""
    return DiT(DIT, GPU)


def small_unet() -> UNet:
    """Return a U-Net for a trial on any machine."""
    return UNet(SMALL_UNET, "cpu")


def small_dit() -> DiT:
    """Return a transformer for a trial on any machine."""
    return DiT(SMALL_DIT, "cpu")
