"""diffusers' hooks around a module's forward: layerwise casting, which workers apply too, and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drp.diffusers.pytree import UnknownValueError

LEFT_OUT = (
    "_diffusers_hook",  # The registry remains after its hooks were removed.
    "_gradient_checkpointing_func",  # It has an effect only if gradients are recorded.
)
"""Attributes of modules that do not affect workers."""
CASTS = ("LayerwiseCastingHook", "PeftInputAutocastDisableHook")
"""Classes of hooks that store weights in one dtype and compute in another."""
REMEDIES = {
    "Offload": "group offloading moves its weights to and fro; load the pipeline without it",
    "Prefetch": "group offloading moves its weights to and fro; load the pipeline without it",
    "ContextParallel": "context parallelism spreads its calls over processes already; leave that out",
    "TensorParallel": "tensor parallelism spreads its calls over processes already; leave that out",
}
"""Messages about hooks, by a part of their class's name."""


def casts_of(module: nn.Module, path: str) -> list[list[str]]:
    """Return the storage and computation dtypes of diffusers' layerwise casting for a module, if it is used.

    Raises UnknownValueError, with the feature and the remedy, for hooks that keep state between steps.
    """
    if (config := getattr(module, "_cache_config", None)) is not None:
        name = type(config).__name__.removesuffix("Config")
        raise UnknownValueError(
            f"{path} has {name} enabled, which reuses results of earlier steps; call disable_cache()"
        )
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    for name, hook in hooks.items():
        kind = type(hook).__name__
        if kind not in CASTS:
            known = next((remedy for part, remedy in REMEDIES.items() if part in kind), None)
            other = f"{kind} ({name}) is around its forward; remove it, with disable_cache() if it is a cache"
            raise UnknownValueError(f"{path}: {known or other}")
    found = [hook for hook in hooks.values() if hasattr(hook, "storage_dtype")]
    return [[_name(hook.storage_dtype), _name(hook.compute_dtype)] for hook in found]


def add_cast(module: nn.Module, storage: torch.dtype, compute: torch.dtype) -> None:
    """Apply layerwise casting to a module, as in the pipeline's process."""
    from diffusers.hooks.layerwise_casting import apply_layerwise_casting_hook

    apply_layerwise_casting_hook(module, storage, compute, non_blocking=False)


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
