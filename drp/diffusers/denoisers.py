"""The components of a pipeline that its steps call."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

from torch import nn

from drp.diffusers.watch import schedulers_of

DENOISERS = ("unet", "transformer", "transformer_2", "controlnet", "prior")
"""Names of components that the steps call, in addition to every component that takes a timestep."""
TIMES = ("timestep", "timesteps", "timestep_ratio", "sigma", "t", "r")
"""Names of the parameter of a module's forward that has the noise level of its input."""


def find_denoisers(pipe: Any, denoisers: Sequence[str] | None) -> list[str]:
    """Return the names of the components that the pipeline's steps call."""
    if isinstance(denoisers, str):
        denoisers = [denoisers]
    if isinstance(pipe, type) or not any(True for _ in schedulers_of(pipe)):
        given = f"the class {pipe.__name__}" if isinstance(pipe, type) else type(pipe).__name__
        raise ValueError(
            f"{given} has no scheduler with a step method, whose steps drp would draft; give a loaded pipeline, as "
            "DiffusionPipeline.from_pretrained(...) returns"
        )
    modules = {n: getattr(pipe, n) for n in denoisers or DENOISERS if isinstance(getattr(pipe, n, None), nn.Module)}
    if not denoisers:
        for name, component in getattr(pipe, "components", {}).items():
            if isinstance(component, nn.Module) and any(t in signature(component.forward).parameters for t in TIMES):
                modules.setdefault(name, component)
    names = list(modules)
    if not names or (denoisers and len(names) < len(denoisers)):
        wanted = ", ".join(denoisers or DENOISERS)
        raise ValueError(f"{type(pipe).__name__} lacks {wanted}; name its denoising modules in `denoisers`")
    return names
