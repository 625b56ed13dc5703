"""Models: naming and loading of denoisers, and the trained models that come with drp."""

from drp.models.registry import Denoiser, describe, load
from drp.protocol.messages import ModelSpec

__all__ = ["Denoiser", "ModelSpec", "describe", "load"]
