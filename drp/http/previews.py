"""Previews: what the latents of a diffusers pipeline look like."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from drp.pictures import encode_grid

log = logging.getLogger(__name__)


def decoder(pipe: Any, arguments: Mapping[str, Any]) -> Callable[[Tensor], bytes | None]:
    """Return what makes a PNG of the first of a call's latents, and None where it is not known how.

    Latents [B, C, H, W] go through the pipeline's VAE, if it has one, and are else the image. Those of Flux and its kin
    [B, patches, C] are unpacked first. Of video there are no previews.
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
        except Exception:  # It is a picture on the way: the images themselves do not depend on it.
            log.warning("%s: no preview of latents %s", type(pipe).__name__, list(latents.shape), exc_info=True)
            return None

    return decode
