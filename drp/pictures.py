"""Pictures of samples."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from torch import Tensor


def save_grid(samples: Tensor | NDArray[Any], columns: int, path: Path, scale: int = 2) -> None:
    """Write samples [B, 1 or 3, H, W] in [-1, 1] as one PNG with `columns` per row, enlarged by `scale`."""
    path.write_bytes(encode_grid(samples, columns, scale, 2))


def encode_grid(samples: Tensor | NDArray[Any], columns: int, scale: int, border: int) -> bytes:
    """Return such a PNG with a border around each sample."""
    array = samples if isinstance(samples, np.ndarray) else samples.numpy(force=True)  # also of a tensor on a GPU
    tiles = array.astype(np.float32)
    if tiles.ndim != 4 or tiles.shape[1] not in (1, 3):
        raise ValueError(f"samples of shape {list(tiles.shape)} are not pictures; a picture has 1 or 3 channels")
    tiles = tiles.repeat(scale, axis=2).repeat(scale, axis=3)
    around = (border, border)
    tiles = np.pad(tiles, ((0, -len(tiles) % columns), (0, 0), around, around), constant_values=-1)
    b, c, h, w = tiles.shape
    grid = tiles.reshape(b // columns, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(b // columns * h, -1, c)
    pixels = np.nan_to_num((grid + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    file, info = io.BytesIO(), PngInfo()
    info.add_text("Software", "draft-refine")
    Image.fromarray(pixels[:, :, 0] if c == 1 else pixels).save(file, "PNG", pnginfo=info)
    return file.getvalue()
