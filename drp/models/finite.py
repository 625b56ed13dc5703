"""The check for NaN and infinity in predictions, shared by workers and the reference."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from drp.protocol.timeline import is_finite


def check_finite(outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> None:
    """Raise FloatingPointError if a denoiser returned NaN or infinity for these inputs; shapes are not checked."""
    for name, output in outputs.items():
        if not is_finite(output):
            wrong = "NaN" if output.isnan().any() else "infinity"
            given = "" if all(tensor.isfinite().all() for tensor in inputs.values()) else ", as it was given"
            raise FloatingPointError(f"the denoiser returned {wrong} in {name!r}{given}")
