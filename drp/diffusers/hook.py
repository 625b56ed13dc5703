"""The replacement of `forward` in a parallelised module."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Hook:
    """Replaces a module's `forward` until it is `over`."""

    def __init__(self, evaluate: Callable[..., Any], original: Callable[..., Any]) -> None:
        self._evaluate, self._original = evaluate, original
        self.over = False
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._original(*args, **kwargs) if self.over else self._evaluate(*args, **kwargs)
