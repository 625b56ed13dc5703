"""CUDA errors that leave a worker's context unusable."""

from __future__ import annotations

import torch

UNRECOVERABLE_ERRORS = (
    "an illegal memory access was encountered",
    "device-side assert triggered",
    "unspecified launch failure",
    "the launch timed out and was terminated",
    "an illegal instruction was encountered",
    "misaligned address",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "hardware stack error",
    "uncorrectable ECC error encountered",
    "uncorrectable NVLink error detected during the execution",
    "unknown error",
)
"""What cudaGetErrorString says for the errors of which CUDA's documentation says that the process must be ended: every
later call returns the same error."""


def is_unrecoverable(error: BaseException) -> bool:
    """Whether an error has left the process's CUDA context unusable.

    torch raises these as torch.AcceleratorError, before 2.8 as RuntimeError, with CUDA's text after "CUDA error";
    `drp.errors.CudaError` has it after the name of the call. A lack of memory is not such an error, since the memory
    allocated for the draft is freed.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError) or not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return ("CUDA error" in text or text.startswith("cuda")) and any(ending in text for ending in UNRECOVERABLE_ERRORS)
