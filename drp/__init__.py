"""drp, the draft-and-refine pipeline: one diffusion sampling run, spread over several devices.

result = drp.sample("digits", labels=[3, 1, 4], steps=48, devices=2, mode="aggressive")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drp.lazy import lazy_getattr
from drp.platforms import require_linux

if TYPE_CHECKING:
    from drp.api import reference, sample
    from drp.client import Client
    from drp.comparison import compare
    from drp.errors import CudaError, DRPError, ProtocolError, RefusedError, WorkerError
    from drp.leader import ExecutionOptions, Leader, LeaderOptions
    from drp.leader.ray import on_ray
    from drp.leader.remote import RemoteWorkers
    from drp.models import ModelSpec
    from drp.sampling.result import Result

    __version__: str

__all__ = [
    "Client",
    "CudaError",
    "DRPError",
    "ExecutionOptions",
    "Leader",
    "LeaderOptions",
    "ModelSpec",
    "ProtocolError",
    "RefusedError",
    "RemoteWorkers",
    "Result",
    "WorkerError",
    "compare",
    "on_ray",
    "reference",
    "sample",
]

# Imported on first use: a worker imports this package before it is pinned, and torch must be imported after that.
_MODULES = {
    "Client": "drp.client",
    "CudaError": "drp.errors",
    "DRPError": "drp.errors",
    "ExecutionOptions": "drp.leader",
    "Leader": "drp.leader",
    "LeaderOptions": "drp.leader",
    "ModelSpec": "drp.models",
    "ProtocolError": "drp.errors",
    "RefusedError": "drp.errors",
    "RemoteWorkers": "drp.leader.remote",
    "Result": "drp.sampling.result",
    "WorkerError": "drp.errors",
    "compare": "drp.comparison",
    "on_ray": "drp.leader.ray",
    "reference": "drp.api",
    "sample": "drp.api",
}
_import = lazy_getattr(__name__, _MODULES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from drp.version import find_version  # Imported here, since workers do not need it.

        return find_version()
    if name in _MODULES:
        require_linux()
    return _import(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
