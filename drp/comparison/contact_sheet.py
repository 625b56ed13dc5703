"""The contact sheet of the report: the pictures of a seed in a row, and how they differ from the untouched ones."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from drp.comparison.store import UNTOUCHED, Store

SIDE = 256
"""Pixels of the longer side of a picture in the report; the files beside it have all."""
PIXEL_ART = 64
"""Pixels of a side up to which pictures are stored without loss and drawn with hard edges."""
MOST_SEEDS = 16


@dataclass(frozen=True)
class Tile:
    """A picture and its difference from the untouched one, as data URIs; the untouched one has no difference."""

    picture: str
    difference: str | None


@dataclass(frozen=True)
class ContactSheet:
    """`rows` have a tile for each of `columns`; differences are multiplied by `gain`."""

    columns: list[str]
    rows: list[tuple[int, list[Tile]]]
    gain: float
    small: bool


def contact_sheet(store: Store, seeds: Sequence[int]) -> ContactSheet | None:
    """Return the sheet of the untouched samples and of all cells; None if the samples are no pictures."""
    exact = store.images(UNTOUCHED)
    if not exact:
        return None
    cells = store.results["cells"]
    others = {key: store.images(key) for key in cells}
    gain = _gain([(images[0], exact[row][0]) for each in others.values() for row, images in enumerate(each)])
    rows = []
    for row, seed in enumerate(seeds[:MOST_SEEDS]):
        first = exact[row][0]
        tiles = [Tile(_uri(first), None)]
        for images in others.values():
            apart = _difference(images[row][0], first) * gain
            tiles.append(Tile(_uri(images[row][0]), _uri(apart.clamp(0, 255).to(torch.uint8))))
        rows.append((seed, tiles))
    labels = ["untouched", *(cell["label"] for cell in cells.values())]
    return ContactSheet(labels, rows, gain, max(exact[0][0].shape[1:]) <= PIXEL_ART)


def _difference(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).abs()


def _gain(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the factor that makes the largest differences white, rounded down to 1, 2, 5, 10, ..."""
    most = max((float(_difference(a, b).max()) for a, b in pairs), default=0.0)
    return float(max((g for g in (1, 2, 5, 10, 20, 50, 100, 200) if g * most <= 255), default=1))


def _uri(image: Tensor) -> str:
    """Return a picture, uint8 [C, H, W], as a data URI."""
    pixels = np.asarray(image[0] if len(image) == 1 else image.movedim(0, -1))
    picture, file = Image.fromarray(pixels), io.BytesIO()
    if max(picture.size) <= PIXEL_ART:
        picture.save(file, "PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    picture.thumbnail((SIDE, SIDE))
    picture.save(file, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
