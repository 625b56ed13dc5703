"""Pictures of samples."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F


def save_grid(samples: Tensor, columns: int, path: Path, scale: int = 2) -> None:
    """Write [B, 1 or 3, H, W] in [-1, 1] as one PNG, `columns` a row, each pixel `scale` pixels wide."""
    path.write_bytes(encode_grid(samples, columns, scale, 2))


def encode_grid(samples: Tensor, columns: int, scale: int, border: int) -> bytes:
    """Return such a PNG, `border` pixels around each sample."""
    if samples.dim() != 4 or samples.shape[1] not in (1, 3):
        raise ValueError(f"samples of shape {list(samples.shape)} are no pictures; a picture has 1 or 3 channels")
    missing = -len(samples) % columns
    tiles = torch.cat([samples, samples.new_full((missing, *samples.shape[1:]), -1.0)])
    tiles = F.pad(F.interpolate(tiles, scale_factor=scale, mode="nearest"), [border] * 4, value=-1.0)
    b, c, h, w = tiles.shape
    grid = tiles.view(b // columns, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(b // columns * h, columns * w, c)
    pixels = grid.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    file, info = io.BytesIO(), PngInfo()
    info.add_text("Software", "draft-refine")
    Image.fromarray(pixels.squeeze(2).numpy() if c == 1 else pixels.numpy()).save(file, "PNG", pnginfo=info)
    return file.getvalue()
