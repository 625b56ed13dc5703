"""A small class-conditional U-Net for 28 x 28 images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """Sinusoids of the timestep, as in DDPM (Ho et al. 2020, section B).

    `t` is [B], in the units of the training grid (0 to 1000); the result is [B, width].
    """
    half = width // 2
    rates = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * rates[None, :]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """Two convolutions with a skip connection; the embedding scales and shifts the activations between them."""

    def __init__(self, c_in: int, c_out: int, embed: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.film = nn.Linear(embed, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]  # Conv2d.bias is typed as optional

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`x` [B, c_in, H, W], `embedding` [B, embed]; returns [B, c_out, H, W]."""
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        out: Tensor = self.skip(x) + h
        return out


class Attention(nn.Module):
    """Self-attention over the pixels of the lowest resolution."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]  # Conv2d.bias is typed as optional

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, channels, H, W]; returns the same shape."""
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w).transpose(-1, -2).unbind(1)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, h, w)
        out: Tensor = x + self.out(mixed)
        return out


class UNet(nn.Module):
    """Predicts the noise in a [B, 1, 28, 28] image at timestep t, given its class.

    Class `classes` (one past the last) means "no class", for classifier-free guidance.
    """

    def __init__(self, channels: tuple[int, int, int] = (32, 64, 96), classes: int = 10, embed: int = 128) -> None:
        super().__init__()
        high, middle, low = channels
        self.embed_width = embed
        self.label = nn.Embedding(classes + 1, embed)
        self.time = nn.Sequential(nn.Linear(embed, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.stem = nn.Conv2d(1, high, 3, padding=1)
        self.down1 = ResBlock(high, high, embed)
        self.shrink1 = nn.Conv2d(high, middle, 3, stride=2, padding=1)
        self.down2 = ResBlock(middle, middle, embed)
        self.shrink2 = nn.Conv2d(middle, low, 3, stride=2, padding=1)
        self.low1 = ResBlock(low, low, embed)
        self.attend1 = Attention(low, heads=4)
        self.low2 = ResBlock(low, low, embed)
        self.attend2 = Attention(low, heads=4)
        self.low3 = ResBlock(low, low, embed)
        self.grow2 = nn.Conv2d(low, middle, 3, padding=1)
        self.up2 = ResBlock(2 * middle, middle, embed)
        self.grow1 = nn.Conv2d(middle, high, 3, padding=1)
        self.up1 = ResBlock(2 * high, high, embed)
        self.norm = nn.GroupNorm(8, high)
        self.head = nn.Conv2d(high, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """`x` float [B, 1, 28, 28], `t` [B], `labels` int64 [B]; returns the noise, like `x`."""
        e = F.silu(self.time(timestep_embedding(t, self.embed_width)) + self.label(labels))
        h1 = self.down1(self.stem(x), e)
        h2 = self.down2(self.shrink1(h1), e)
        h = self.attend1(self.low1(self.shrink2(h2), e))
        h = self.low3(self.attend2(self.low2(h, e)), e)
        h = F.interpolate(self.grow2(h), scale_factor=2, mode="nearest")
        h = self.up2(torch.cat([h, h2], dim=1), e)
        h = F.interpolate(self.grow1(h), scale_factor=2, mode="nearest")
        h = self.up1(torch.cat([h, h1], dim=1), e)
        out: Tensor = self.head(F.silu(self.norm(h)))
        return out
