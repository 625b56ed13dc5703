"""NVTX ranges for Nsight Systems; without them, calls are unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.cuda import nvtx

P = ParamSpec("P")
T = TypeVar("T")


def annotate(name: str, call: Callable[P, T]) -> Callable[P, T]:
    """Return a function that does as `call` does, within a range of this name; it needs a torch built with CUDA."""

    def within(*args: P.args, **kwargs: P.kwargs) -> T:
        nvtx.range_push(name)  # type: ignore[no-untyped-call]  # torch has no types for it
        try:
            return call(*args, **kwargs)
        finally:
            nvtx.range_pop()  # type: ignore[no-untyped-call]  # torch has no types for it

    return within


def annotate_methods(owner: object, **names: str) -> None:
    """Have each call of an object's methods be within a range: by method, the range's name."""
    for method, name in names.items():
        setattr(owner, method, annotate(name, getattr(owner, method)))
