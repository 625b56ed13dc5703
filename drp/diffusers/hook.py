"""The replacement of `forward` in a parallelised module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch


class Hook:
    """Replaces a module's `forward` until it is `over`."""

    def __init__(self, evaluate: Callable[..., Any], original: MethodType) -> None:
        self._evaluate, self._original = evaluate, original
        self.over = False
        functools.update_wrapper(self, original)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # A module that is compiled meanwhile must not have drp's own code compiled.
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._original(*args, **kwargs) if self.over else self._evaluate(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Have copies and pickles of the module hold their own class's forward instead."""
        return getattr, (self._original.__self__, "forward")
