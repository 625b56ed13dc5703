"""Models: how denoisers are named and loaded, and the trained ones that come with drp."""

from drp.models.registry import Denoiser, describe, load
from drp.protocol.messages import ModelSpec

__all__ = ["Denoiser", "ModelSpec", "describe", "load"]
