"""The simulator: predicts the time of runs for a mode, a policy and devices by a discrete-event model of the engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drp.simulate.costs import Costs
    from drp.simulate.devices import Device, make_devices
    from drp.simulate.engine import simulate
    from drp.simulate.load import Load
    from drp.simulate.network import Link
    from drp.simulate.state import Outcome

__all__ = ["Costs", "Device", "Link", "Load", "Outcome", "make_devices", "simulate"]

# Imported on first use, so that the command line shows its help without importing torch.
_HOMES = {
    "Costs": "costs",
    "Device": "devices",
    "Link": "network",
    "Load": "load",
    "Outcome": "state",
    "make_devices": "devices",
    "simulate": "engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'drp.simulate' has no attribute {name!r}")
    return getattr(importlib.import_module(f"drp.simulate.{_HOMES[name]}"), name)
