"""Previews of the latents of a diffusers pipeline."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from drp.pictures import encode_grid

log = logging.getLogger(__name__)


def decoder(pipe: Any, arguments: Mapping[str, Any]) -> Callable[[Tensor], bytes | None]:
    """Return a function that decodes the first of a call's latents to a PNG, or returns None if it cannot.

    Latents [B, C, H, W] are decoded by the pipeline's VAE, or are the image if it has none. The packed latents of
    pipelines such as Flux, [B, patches, C], are unpacked first. There are no previews of video.
    """
    vae = getattr(pipe, "vae", None)

    def decode(latents: Tensor) -> bytes | None:
        try:
            with torch.inference_mode():
                first = latents[:1]
                if first.dim() == 3 and hasattr(pipe, "_unpack_latents"):
                    scale = pipe.vae_scale_factor
                    side = pipe.default_sample_size * scale
                    height, width = (arguments.get(name, side) for name in ("height", "width"))
                    first = pipe._unpack_latents(first, height, width, scale)
                if first.dim() != 4:
                    return None
                if vae is not None:
                    shift = getattr(vae.config, "shift_factor", None) or 0.0
                    first = first.to(vae.dtype) / vae.config.scaling_factor + shift
                    first = vae.decode(first, return_dict=False)[0]
                return encode_grid(first.float().cpu().clamp(-1, 1), 1, 1, 0)
        except Exception:  # A missing preview does not affect the images.
            why = traceback.format_exc()  # As text: a record with the exception would keep the pipeline's memory.
            log.warning("%s: no preview of latents %s:\n%s", type(pipe).__name__, list(latents.shape), why)
            return None

    return decode
