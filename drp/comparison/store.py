"""The folder of a comparison: measurements and samples, so that it can be continued and verified.

results.json                    the figures of every setting, and what they were measured on
samples/<setting>/latents.safetensors    `latents` float32 [S, ...], a row for each seed
samples/<setting>/0003-0.png    the first picture of the fourth seed
samples/<setting>/trace.json    one run of the setting, for Perfetto and `drp trace summary`
report.html, report.md
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from drp.comparison.subject import Sample

SOFTWARE = "draft-refine"
RESULTS = "results.json"
UNTOUCHED = "untouched"


class Store:
    """The results in a folder; raises ValueError if the folder holds something else.

    facts: everything that the results depend on. A comparison with the same facts is continued, and its cells kept.
    force: replace the existing contents.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], force: bool = False) -> None:
        self.folder = folder
        self.results: dict[str, Any] = {"software": SOFTWARE, "facts": json.loads(json.dumps(facts)), "cells": {}}
        check_folder(folder, force)
        path = folder / RESULTS
        if path.exists():
            self._take_over(path, force)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out is {str(folder)!r}, which cannot be made: {error.strerror}") from None

    def _take_over(self, path: Path, force: bool) -> None:
        """Continue an earlier comparison, or remove it."""
        if force:
            shutil.rmtree(self.folder / "samples", ignore_errors=True)
            return
        try:
            found = json.loads(path.read_text())
            before, cells = found["facts"], dict(found["cells"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not a comparison written by drp; name another folder, or use force") from None
        wanted = self.results["facts"]
        differing = [name for name in {**before, **wanted} if before.get(name) != wanted.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{path} was measured with {name} {before.get(name)!r:.80}, not {wanted.get(name)!r:.80}; name another "
                "folder, or use force to replace it"
            )
        self.results["cells"] = cells
        self.results |= {UNTOUCHED: found[UNTOUCHED]} if UNTOUCHED in found else {}

    def samples(self, key: str) -> Path:
        """Return the folder for the samples of a setting, which is made."""
        path = self.folder / "samples" / key
        path.mkdir(parents=True, exist_ok=True)
        return path

    def save_samples(self, key: str, samples: Sequence[Sample]) -> None:
        folder = self.samples(key)
        stacked = torch.stack([sample.latents.float().cpu() for sample in samples]).contiguous()
        save_file({"latents": stacked}, folder / "latents.safetensors", {"software": SOFTWARE})
        for old in folder.glob("*.png"):
            old.unlink()
        for number, sample in enumerate(samples):
            for place, image in enumerate(sample.images if sample.images is not None else ()):
                pixels = image[0] if len(image) == 1 else image.movedim(0, -1)
                Image.fromarray(pixels.numpy()).save(folder / f"{number:04}-{place}.png")

    def latents(self, key: str) -> Tensor:
        """Return the latents of a setting, [S, ...]."""
        return load_file(self.folder / "samples" / key / "latents.safetensors")["latents"]

    def images(self, key: str) -> list[list[Tensor]]:
        """Return the pictures of a setting by seed, uint8 [C, H, W]; no pictures if the samples are none."""
        found: dict[str, list[Tensor]] = {}
        for path in sorted((self.folder / "samples" / key).glob("*.png"), key=_place):
            found.setdefault(path.stem.partition("-")[0], []).append(read_image(path))
        return list(found.values())

    def write(self) -> None:
        """Write results.json, in place of the one before only when it is complete."""
        path = self.folder / RESULTS
        draft = path.with_suffix(".json.part")
        draft.write_text(json.dumps(_plain(self.results), indent=1, allow_nan=False) + "\n")
        draft.replace(path)


def check_folder(folder: Path, force: bool = False) -> None:
    """Raise ValueError unless a comparison can be in this folder: it is new, empty, or has one already."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        what = "which is a file" if there == folder.absolute() else f"and {str(there)!r} is a file"
        raise ValueError(f"out is {str(folder)!r}, {what}; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"out is {str(folder)!r}, and you may not write to {str(there)!r}; name another folder")
    if folder.exists() and any(folder.iterdir()) and not (force or (folder / RESULTS).exists()):
        raise ValueError(f"out is {str(folder)!r}, a folder with other things in it; name a new one, or use force")


def read_image(path: Path) -> Tensor:
    """Return a picture, uint8 [1 or 3, H, W]."""
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.dim() == 2 else pixels.movedim(-1, 0)


def _place(path: Path) -> tuple[int, ...]:
    return tuple(map(int, path.stem.split("-")))


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: infinite numbers, such as the PSNR of equal pictures, as null."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
