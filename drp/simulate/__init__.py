"""The simulator: predicts the time of runs for a mode, a policy and devices by a discrete-event model of the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drp.lazy import lazy_getattr

if TYPE_CHECKING:
    from drp.simulate.costs import Costs
    from drp.simulate.devices import SimulatedDevice, make_devices
    from drp.simulate.engine import simulate
    from drp.simulate.load import Workload
    from drp.simulate.network import Link
    from drp.simulate.state import Outcome

__all__ = ["Costs", "Link", "Outcome", "SimulatedDevice", "Workload", "make_devices", "simulate"]

# Imported on first use, so that the command line shows its help without importing torch.
_MODULES = {
    "Costs": "drp.simulate.costs",
    "SimulatedDevice": "drp.simulate.devices",
    "Link": "drp.simulate.network",
    "Workload": "drp.simulate.load",
    "Outcome": "drp.simulate.state",
    "make_devices": "drp.simulate.devices",
    "simulate": "drp.simulate.engine",
}
__getattr__ = lazy_getattr(__name__, _MODULES)
