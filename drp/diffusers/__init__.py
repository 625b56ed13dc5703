"""diffusers: a pipeline of diffusers, its steps spread over several devices by one line. See docs/diffusers.md."""

from drp.diffusers.parallel import Parallel, parallelize, reference
from drp.diffusers.report import CallReport, Report
from drp.diffusers.workers import Workers

__all__ = ["CallReport", "Parallel", "Report", "Workers", "parallelize", "reference"]
