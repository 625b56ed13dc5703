"""NVTX ranges for Nsight Systems."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.cuda import nvtx

Call = TypeVar("Call", bound=Callable[..., object])


def annotate(name: str, call: Call) -> Call:
    """Return a function that calls `call` within a range of this name. It needs a torch built with CUDA."""
    annotated: Call = nvtx.range(name)(call)
    return annotated


def annotate_methods(owner: object, **names: str) -> None:
    """Wrap methods of an object in ranges: method -> name of the range."""
    for method, name in names.items():
        setattr(owner, method, annotate(name, getattr(owner, method)))
