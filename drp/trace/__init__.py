"""Traces: what happened where and when, as a file that Perfetto and chrome://tracing open, and where the time went."""

from drp.trace.events import read, write
from drp.trace.record import record
from drp.trace.summary import summarise

__all__ = ["read", "record", "summarise", "write"]
