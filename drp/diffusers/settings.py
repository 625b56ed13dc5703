"""Settings of torch and diffusers that change a module's bits, which workers take over from the calling process."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._device import DeviceContext

from drp.diffusers.pytree import Json
from drp.torch_defaults import SETTINGS

try:
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
except ImportError:  # an older diffusers
    _AttentionBackendRegistry = None


MODES = (
    (torch._C._len_torch_function_stack, torch._C._get_function_stack_at),
    (torch._C._len_torch_dispatch_stack, torch._C._get_dispatch_stack_at),
)
"""How many modes there are, of functions and of dispatch, and what returns each."""


def read_settings() -> Json:
    """Return the settings of this process, including those of an enclosing `sdpa_kernel` or `attention_backend` block.

    Raises ValueError for what is not supported: torch.autocast, modes that intercept torch's functions, and hooks of
    all modules.
    """
    if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise ValueError("the pipeline runs under torch.autocast, which workers do not")
    modes = [type(get(i)) for count, get in MODES for i in range(count())]
    if other := [mode.__name__ for mode in modes if mode is not DeviceContext]:
        raise ValueError(f"the pipeline runs under {other[-1]}, which changes torch's functions in this process only")
    if _has_any_global_hook():  # type: ignore[no-untyped-call]  # torch has no types for it
        raise ValueError("there is a hook of all modules, by torch.nn.modules.module, which workers lack; remove it")
    if (name := replaced_function()) is not None:
        raise ValueError(f"torch.nn.functional.{name} was replaced in this process, and workers have torch's own")
    values = [read() for read, _, _ in SETTINGS]
    backend = None if _AttentionBackendRegistry is None else _AttentionBackendRegistry.get_active_backend()[0]
    return {
        "torch": [{"dtype": str(v).removeprefix("torch.")} if isinstance(v, torch.dtype) else v for v in values],
        "attention": backend and getattr(backend, "value", backend),
    }


def replaced_function() -> str | None:
    """Return the name of a function of `torch.nn.functional` that is not torch's, None if there is none."""
    for name, value in vars(torch.nn.functional).items():
        if isinstance(value, types.FunctionType) and not _is_of_torch(value):
            return name
    return None


def _is_of_torch(function: types.FunctionType) -> bool:
    names = function.__module__ or "", function.__globals__.get("__name__", "")
    return all(name.partition(".")[0] == "torch" for name in names)


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
