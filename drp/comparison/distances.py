"""Distances of samples from those of the untouched run: of latents, and of the pictures they decode to."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

CLIP = "openai/clip-vit-base-patch32"
"""The CLIP model that is used if it is in the local cache of the hub and no other is named."""
LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"
"""torchvision's weights of LPIPS' network, in torch.hub's folder of checkpoints."""
LPIPS_SMALLEST = 32
"""Pixels; smaller pictures leave nothing of the network's last layers."""
EXTRA = "pip install 'draft-refine[compare]'"

Compare = Callable[[Tensor, Tensor], float]
"""Returns the distance of two pictures, uint8 [C, H, W]."""


@dataclass(frozen=True)
class Measure:
    """A distance or a similarity of two pictures.

    summary: how the figures of the seeds become one; `median` where a figure may be infinite.
    """

    name: str
    title: str
    better: Literal["lower", "higher"]
    compare: Compare
    summary: Literal["mean", "median"] = "mean"

    def summarise(self, values: Sequence[float]) -> float:
        return statistics.median(values) if self.summary == "median" else statistics.fmean(values)


def relative_l2(samples: Tensor, exact: Tensor) -> list[float]:
    """Return |samples_i - exact_i| / |exact_i| for samples [S, ...], computed in float64."""
    a, b = samples.double().flatten(1), exact.double().flatten(1)
    apart: list[float] = ((a - b).norm(dim=1) / b.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)).tolist()
    return apart


def measures(shape: Sequence[int], clip: str | None = None) -> tuple[list[Measure], dict[str, str]]:
    """Return what can be measured of pictures [C, H, W] on this machine, and by name why the rest cannot.

    Nothing is downloaded: CLIP and LPIPS need their weights in the local caches, or `clip`, a folder or a hub's name
    that is in the cache.
    """
    found: list[Measure] = []
    omitted: dict[str, str] = {}
    if importlib.util.find_spec("torchmetrics") is None:
        omitted |= dict.fromkeys(("PSNR", "SSIM", "LPIPS"), f"torchmetrics is not installed: {EXTRA}")
    else:
        found.append(Measure("psnr", "PSNR, dB", "higher", _psnr, "median"))
        if min(shape[1:]) < SSIM_WINDOW:
            omitted["SSIM"] = f"its window is {SSIM_WINDOW} pixels wide, the pictures are {shape[1]} x {shape[2]}"
        else:
            found.append(Measure("ssim", "SSIM", "higher", _ssim))
        try:
            found.append(Measure("lpips", "LPIPS", "lower", _lpips(shape)))
        except _OmittedError as reason:
            omitted["LPIPS"] = str(reason)
    try:
        found.append(Measure("clip", "CLIP similarity", "higher", _clip(clip)))
    except _OmittedError as reason:
        omitted["CLIP similarity"] = str(reason)
    return found, omitted


class _OmittedError(Exception):
    """Why something cannot be measured here."""


SSIM_WINDOW = 11
"""Pixels, as in Wang et al. 2004."""


def _unit(image: Tensor) -> Tensor:
    return image.float()[None] / 255


def _psnr(a: Tensor, b: Tensor) -> float:
    """Return the peak signal-to-noise ratio, infinite for equal pictures."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return math.inf if torch.equal(a, b) else float(peak_signal_noise_ratio(_unit(a), _unit(b), data_range=1.0))


def _ssim(a: Tensor, b: Tensor) -> float:
    from torchmetrics.functional.image import structural_similarity_index_measure

    return float(structural_similarity_index_measure(_unit(a), _unit(b), data_range=1.0))  # type: ignore[arg-type]  # no pair


def _lpips(shape: Sequence[int]) -> Compare:
    """Return LPIPS (Zhang et al. 2018) with AlexNet."""
    if importlib.util.find_spec("torchvision") is None:
        raise _OmittedError(f"torchvision is not installed: {EXTRA}")
    weights = Path(torch.hub.get_dir(), "checkpoints", LPIPS_WEIGHTS)
    if not weights.exists():
        raise _OmittedError(f"its weights are not in {weights}; torchvision downloads them: alexnet(weights='DEFAULT')")
    if min(shape[1:]) < LPIPS_SMALLEST:
        raise _OmittedError(f"it needs pictures of {LPIPS_SMALLEST} pixels, these are {shape[1]} x {shape[2]}")
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    network: Any = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)

    def compare(a: Tensor, b: Tensor) -> float:
        with torch.inference_mode():
            return float(network(*(_unit(image).expand(-1, 3, -1, -1) for image in (a, b))))

    return compare


def _is_cached(name: str) -> bool:
    """Return whether a model is in the hub's local cache."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _clip(name: str | None) -> Compare:
    """Return the cosine of the image embeddings of CLIP (Radford et al. 2021)."""
    if importlib.util.find_spec("transformers") is None:
        raise _OmittedError("transformers is not installed: pip install 'draft-refine[diffusers]'")
    if name is None and not _is_cached(CLIP):
        raise _OmittedError(f"{CLIP} is not in the hub's local cache; download it, or name another CLIP model")
    from transformers import AutoImageProcessor, CLIPModel

    wanted = name or CLIP
    try:
        model: Any = CLIPModel.from_pretrained(wanted, local_files_only=True)
        kind: Any = AutoImageProcessor  # it has no types
        processor = kind.from_pretrained(wanted, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"clip is {wanted!r}, from which no CLIP model can be loaded: {error}") from None
    model.eval()

    def embed(image: Tensor) -> Tensor:
        pixels = processor(images=image.expand(3, -1, -1), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            found = model.get_image_features(pixel_values=pixels)
        features: Tensor = getattr(found, "pooler_output", found)  # transformers 5 returns an output object
        unit: Tensor = features[0] / features[0].norm()
        return unit

    return lambda a, b: float(embed(a) @ embed(b))
