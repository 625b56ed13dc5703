"""torch's default settings, with which the reference runs, as the workers do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.backends import cuda, cudnn, mkldnn

Setting = tuple[Callable[[], Any], Callable[[Any], object], Any]


def _attribute(owner: Any, name: str, default: Any) -> Setting:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value), default


def _flushes_denormals() -> bool:
    """Return whether denormal numbers are flushed to zero in this thread; torch has no function for this."""
    return not (torch.tensor(2.0**-140, dtype=torch.float32, device="cpu") * 1.0).item()


SETTINGS: tuple[Setting, ...] = (
    (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, 0),
    (_flushes_denormals, torch.set_flush_denormal, False),
    _attribute(mkldnn, "enabled", True),
    _attribute(cudnn, "enabled", True),
    _attribute(cudnn, "benchmark", False),
    _attribute(cudnn, "deterministic", False),
    _attribute(cudnn, "allow_tf32", True),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp, True),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp, True),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp, True),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp, True),
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
