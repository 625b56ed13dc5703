"""Modules compiled by torch.compile. Workers compile the original module themselves."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule

from drp.diffusers.pytree import UnknownValueError
from drp.models.gpu import LIMITS, compiler_options

COMPILED = "_compiled_call_impl"
"""The attribute in which `nn.Module.compile` stores the compiled code."""


class OriginalForward:
    """A module as its pipeline calls it without drp: by its class's forward, or by its compiled code.

    module: the original module, also if the pipeline has the result of `torch.compile(module)`.
    """

    def __init__(self, module: nn.Module) -> None:
        wrapped = isinstance(module, OptimizedModule)
        self.module: Any = module._orig_mod if wrapped else module
        self.compiled = module if wrapped else vars(module).get(COMPILED)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate in this process."""
        if self.compiled is None:
            return type(self.module).forward(self.module, *args, **kwargs)  # The class may have been patched since.
        hook = vars(self.module).pop("forward", None)  # The compiled code has the class's forward in it.
        try:
            return self.compiled(*args, **kwargs)
        finally:
            if hook is not None:
                vars(self.module)["forward"] = hook


def options_of(compiled: Any, path: str) -> dict[str, Any] | None:
    """Return the keyword arguments with which a worker compiles a module, None if it was not compiled.

    Raises UnknownValueError for a compiler other than Inductor, since torch does not keep its name.
    """
    if compiled is None:
        return None
    if getattr(compiled, "get_compiler_config", lambda: None)() is None:
        raise UnknownValueError(
            f"{path} is compiled by another backend than Inductor, whose name torch does not keep for workers"
        )
    return compiler_options()


def compile_in_worker(module: nn.Module, options: dict[str, Any]) -> None:
    """Compile a module in place for all shapes, since shapes that are not compiled have other bits."""
    for name in LIMITS:
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, sys.maxsize)
    module.compile(**options)
