"""Comparison: what drafting gains and costs on a user's model or pipeline: figures, pictures, a recommendation."""

from __future__ import annotations

from drp.comparison.api import Comparison, compare

__all__ = ["Comparison", "compare"]
