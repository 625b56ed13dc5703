"""Parallel sampling for diffusers pipelines. See docs/diffusers.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drp.lazy import lazy_getattr
from drp.platforms import require_linux

require_linux()

if TYPE_CHECKING:
    from drp.diffusers.comparison import compare
    from drp.diffusers.parallel import parallelize, reference
    from drp.diffusers.parallel_pipeline import Parallel
    from drp.diffusers.report import CallReport, Report
    from drp.diffusers.workers import Workers

__all__ = ["CallReport", "Parallel", "Report", "Workers", "compare", "parallelize", "reference"]

# Imported on first use: workers import this package too, and need little of it.
_MODULES = {
    "CallReport": "drp.diffusers.report",
    "Parallel": "drp.diffusers.parallel_pipeline",
    "Report": "drp.diffusers.report",
    "Workers": "drp.diffusers.workers",
    "compare": "drp.diffusers.comparison",
    "parallelize": "drp.diffusers.parallel",
    "reference": "drp.diffusers.parallel",
}
__getattr__ = lazy_getattr(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
