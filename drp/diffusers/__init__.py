"""diffusers: a pipeline of diffusers, its steps spread over several devices by one line. See docs/diffusers.md."""

from drp.platforms import require_linux

require_linux()  # before what is imported next, some of which other systems do not have

from drp.diffusers.comparison import compare  # noqa: E402
from drp.diffusers.parallel import Parallel, parallelize, reference  # noqa: E402
from drp.diffusers.report import CallReport, Report  # noqa: E402
from drp.diffusers.workers import Workers  # noqa: E402

__all__ = ["CallReport", "Parallel", "Report", "Workers", "compare", "parallelize", "reference"]
