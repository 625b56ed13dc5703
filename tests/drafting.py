"""Calls of pipelines through drp in the mode that most tests count the rounds of."""

from __future__ import annotations

from typing import Any

import torch

from drp import diffusers as face
from drp.diffusers import Workers
from tests.pipelines import IMAGE, PIPELINES, VARIANTS
from tests.tiny.builders import pooled, prompts


def parallelize(pipe: Any, devices: Any, mode: Any = "aggressive", **options: Any) -> Any:
    """In the mode that most tests count the rounds of; two workers evaluate three drafts a round."""
    if isinstance(devices, Workers) and len(devices.devices) == 2:
        options.setdefault("drafts", 3)
    return face.parallelize(pipe, devices, mode, **options)


def reference(pipe: Any, *, mode: Any = "aggressive", **options: Any) -> Any:
    return face.reference(pipe, mode=mode, **options)


EVERY = {**PIPELINES, **VARIANTS}

CHEAP = {**prompts(1, 6, 8), **pooled(), **IMAGE}


def digits_noise(count: int) -> torch.Tensor:
    """The noise of `drp.sample` with seed 0."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randn(1, 28, 28, generator=generator) for _ in range(count)])
