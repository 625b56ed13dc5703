"""Figures: percentiles, and the machine they were measured on."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import psutil
from rich.console import Console

from drp.processor import processor_name

PACKAGES = ("drp", "torch", "numpy", "pyzmq", "msgpack", "ray")


def percentile(values: Sequence[float], q: float) -> float:
    """Return the q-th percentile, interpolated."""
    return float(np.percentile(values, q))


def console() -> Console:
    """Return where tables go, wide enough for them also where that is no terminal."""
    return Console(width=max(Console().width, 110))


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, memory, kernel, versions, and how busy the machine was."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    frequency = psutil.cpu_freq()
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "mhz": round(frequency.max or frequency.current) if frequency else None,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": versions,
        "load_before": round(psutil.getloadavg()[0], 2),
    }
