"""Memory of GPUs, and of the host beside it, where CUDA refuses something; the host takes the GPU's place."""

from __future__ import annotations

from typing import Any

import pytest

from drp import ExecutionOptions
from drp.leader.devices import parse_devices
from drp.leader.memory import placement
from drp.leader.memory.placement import MemoryPlacement
from drp.protocol import cuda
from tests.on_host import GPUS, Lent


class Refusing:
    """A CUDA runtime that pins nothing, and remembers its last error until somebody asks for it, as the real one."""

    def __init__(self) -> None:
        self.last = 0

    def cudaHostRegister(self, *arguments: Any) -> int:  # noqa: N802  # the runtime's name
        self.last = 801
        return self.last

    def cudaGetLastError(self) -> int:  # noqa: N802  # the runtime's name
        last, self.last = self.last, 0
        return last

    def cudaGetErrorString(self, code: int) -> bytes:  # noqa: N802  # the runtime's name
        return b"operation not supported"


def test_memory_that_cannot_be_pinned_leaves_no_error_for_torch_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Refusing()
    monkeypatch.setattr(cuda, "_runtime", lambda: runtime)
    assert not cuda.pin(4096, 4096)
    assert runtime.last == 0


@pytest.mark.parametrize(
    ("devices", "home", "shares"),
    [
        ("cuda:0,cuda:1", GPUS[0].uuid, True),  # the other GPU may merely be no peer
        ("cuda:1,cuda:1", GPUS[0].uuid, False),  # no worker on the pipeline's GPU shows that it works at all
        ("cuda:1,cuda:1", GPUS[1].uuid, False),
    ],
)
def test_a_worker_that_reaches_nothing_moves_runs_to_the_host(
    devices: str, home: str, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "GpuMemory", Lent)
    placed = parse_devices(devices, 1, lambda: GPUS)
    made = MemoryPlacement(placed, ExecutionOptions(dispatch="sync", memory=home), 1)
    assert made.shares_gpu_memory
    for number, device in enumerate(placed):
        assert made.worker_config(number, device) is not None
    assert made.check_peer_access(1, "worker 1", "cudaIpcOpenMemHandle failed") == ""
    assert not made.on_gpu
    assert made.shares_gpu_memory is shares
    made.close()
