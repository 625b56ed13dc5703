"""Settings of torch and diffusers that change a module's bits, which workers take over from the calling process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from drp.diffusers.pytree import Json
from drp.torch_defaults import SETTINGS

try:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
except ImportError:  # an older diffusers
    _AttentionBackendRegistry = None


def read_settings() -> Json:
    """Return the settings of this process, including those of an enclosing `sdpa_kernel` or `attention_backend` block.

    Raises ValueError under torch.autocast, which is not supported.
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
    """Apply settings of `read_settings` during a block."""
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
