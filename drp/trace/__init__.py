"""Traces of runs, as files for Perfetto and chrome://tracing, and summaries of how the time was spent."""

from drp.trace.events import read, write
from drp.trace.record import record
from drp.trace.summary import summarise

__all__ = ["read", "record", "summarise", "write"]
