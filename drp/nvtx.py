"""NVTX ranges for Nsight Systems."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.cuda import nvtx

P = ParamSpec("P")
T = TypeVar("T")


def annotate(name: str, call: Callable[P, T]) -> Callable[P, T]:
    """Return a function that calls `call` within a range of this name. It needs a torch built with CUDA."""

    def within(*args: P.args, **kwargs: P.kwargs) -> T:
        nvtx.range_push(name)  # type: ignore[no-untyped-call]  # torch has no types for it
        try:
            return call(*args, **kwargs)
        finally:
            nvtx.range_pop()  # type: ignore[no-untyped-call]  # torch has no types for it

    return within


def annotate_methods(owner: object, **names: str) -> None:
    """Wrap methods of an object in ranges: method -> name of the range."""
    for method, name in names.items():
        setattr(owner, method, annotate(name, getattr(owner, method)))
