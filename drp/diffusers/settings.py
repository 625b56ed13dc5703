"""Settings: what of torch and diffusers in the calling process changes a module's bits, carried over to workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from drp.diffusers.pytree import Json
from drp.torch_defaults import SETTINGS

try:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
except ImportError:  # a diffusers that has no such choice
    _AttentionBackendRegistry = None


def read_settings() -> Json:
    """Return the settings of this process, also those of a `sdpa_kernel` or `attention_backend` block around the call.

    Raises ValueError under torch.autocast, which is not carried over.
    """
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise ValueError("the pipeline runs under torch.autocast, which workers do not")
    values = [read() for read, _, _ in SETTINGS]
    backend = None if _AttentionBackendRegistry is None else _AttentionBackendRegistry.get_active_backend()[0]
    return {
        "torch": [{"dtype": str(v).removeprefix("torch.")} if isinstance(v, torch.dtype) else v for v in values],
        "attention": backend and getattr(backend, "value", backend),
    }


@contextmanager
def applied(settings: Json) -> Iterator[None]:
    """Have settings that `read_settings` returned during a block."""
    with ExitStack() as stack:
        for (read, write, _), wanted in zip(SETTINGS, settings["torch"], strict=True):
            value = getattr(torch, wanted["dtype"]) if isinstance(wanted, dict) else wanted
            if (before := read()) != value:
                stack.callback(write, before)
                write(value)
        if settings["attention"] is not None:
            before = _AttentionBackendRegistry.get_active_backend()[0]
            stack.callback(_AttentionBackendRegistry.set_active_backend, before)
            _AttentionBackendRegistry.set_active_backend(AttentionBackendName(settings["attention"]))
        yield
