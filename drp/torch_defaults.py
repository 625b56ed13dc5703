"""torch's default settings, with which the reference runs, as the workers do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.backends import cuda, cudnn, mha, mkldnn

Setting = tuple[Callable[[], Any], Callable[[Any], object], Any]


def _attribute(owner: Any, name: str, default: Any) -> Setting:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value), default


PRECISIONS: Mapping[str, str] = {
    "": "none",
    "cuda.matmul": "none",
    "cudnn": "none",
    "cudnn.conv": "tf32",
    "cudnn.rnn": "tf32",
    "mkldnn": "none",
    "mkldnn.matmul": "none",
    "mkldnn.conv": "none",
    "mkldnn.rnn": "none",
}
"""What of torch.backends has an attribute `fp32_precision` since torch 2.9, and its default; backends before their
operations, which take it over from them."""
OWNERS: tuple[Any, ...] = (
    tuple(functools.reduce(getattr, filter(None, name.split(".")), torch.backends) for name in PRECISIONS)
    if hasattr(torch.backends, "fp32_precision")
    else ()
)


def _float32_precisions() -> list[Any]:
    """Return the precision of products of float32, by the two functions from before torch 2.9 and by attributes since.

    The older functions raise where a program has set attributes which they cannot express. They are None then.
    """
    older: list[Any] = []
    for read in (torch.get_float32_matmul_precision, lambda: cudnn.allow_tf32):
        try:
            older.append(read())
        except RuntimeError:
            older.append(None)
    return older + [owner.fp32_precision for owner in OWNERS]


def _set_float32_precisions(values: Sequence[Any]) -> None:
    """Set what `_float32_precisions` has returned, the older ones first, since they write to the attributes too."""
    matmul, allow_tf32, *attributes = values
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if allow_tf32 is not None:
        cudnn.allow_tf32 = allow_tf32
    for owner, value in zip(OWNERS, attributes, strict=True):
        if owner.fp32_precision != value:
            owner.fp32_precision = value


def _flushes_denormals() -> bool:
    """Return whether denormal numbers are flushed to zero in this thread; torch has no function for this."""
    return not (torch.tensor(2.0**-140, dtype=torch.float32, device="cpu") * 1.0).item()


def _reductions(name: str) -> Setting:
    """Return the setting of a product's reductions in half precision, with split-k where torch has that."""
    both = [name, f"{name}_split_k"] if hasattr(cuda.matmul, f"{name}_split_k") else [name]

    def write(values: Sequence[bool]) -> None:
        setattr(cuda.matmul, name, tuple(values) if len(both) > 1 else values[0])

    return lambda: [getattr(cuda.matmul, each) for each in both], write, [True] * len(both)


SETTINGS: tuple[Setting, ...] = (
    (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    (_float32_precisions, _set_float32_precisions, ["highest", True, *[*PRECISIONS.values()][: len(OWNERS)]]),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0),
    (_flushes_denormals, torch.set_flush_denormal, False),
    _attribute(mkldnn, "enabled", True),
    _attribute(cudnn, "enabled", True),
    _attribute(cudnn, "benchmark", False),
    _attribute(cudnn, "deterministic", False),
    _reductions("allow_fp16_reduced_precision_reduction"),
    _reductions("allow_bf16_reduced_precision_reduction"),
    *(
        [_attribute(cuda.matmul, "allow_fp16_accumulation", False)]
        if hasattr(cuda.matmul, "allow_fp16_accumulation")  # since torch 2.7
        else []
    ),
    (mha.get_fastpath_enabled, mha.set_fastpath_enabled, True),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, True),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, True),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, True),
    *(
        [(cuda.fp16_bf16_reduction_math_sdp_allowed, cuda.allow_fp16_bf16_reduction_math_sdp, False)]
        if hasattr(cuda, "allow_fp16_bf16_reduction_math_sdp")  # since torch 2.5
        else []
    ),
)
"""The settings that change the bits of a result or can make it fail: getter, setter and default of each."""


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Set torch's defaults during the block, and restore the previous settings afterwards.

    Most settings apply to the whole process, including other threads. torch.autocast is not changed; runs are refused
    under it.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        if torch.get_default_device().type != "cpu":  # Any default device slows down every call of torch.
            stack.enter_context(torch.device("cpu"))
        for read, write, default in SETTINGS:
            if (before := read()) != default:
                stack.callback(write, before)
                write(default)
        yield
