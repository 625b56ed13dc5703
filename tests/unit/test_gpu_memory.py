"""Memory of GPUs, and of the host beside it, where CUDA refuses something; the host takes the GPU's place."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drp import ExecutionOptions
from drp.leader.devices import parse_devices
from drp.leader.memory import placement
from drp.leader.memory.placement import MemoryPlacement
from drp.protocol import cuda
from drp.protocol.arena import Arena
from drp.protocol.handles import GpuHandle
from drp.protocol.memory import LocalMemory
from drp.workers import cuda_device
from drp.workers.cuda_device import CudaDevice
from tests.on_host import GPUS, HostGpuMemory


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


class Recording:
    """A CUDA runtime that notes its calls with the device that is current then."""

    def __init__(self) -> None:
        self.current = 0
        self.calls: list[tuple[str, int, list[Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, self.current, [getattr(each, "value", each) for each in arguments]))
            return 0

        return call

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, getattr(device, "index", device)
        yield
        self.current = before


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Recording:
    made = Recording()
    monkeypatch.setattr(cuda, "_runtime", lambda: made)
    monkeypatch.setattr(cuda, "index_of", lambda uuid: 1)
    monkeypatch.setattr(torch, "as_tensor", lambda span, device: SimpleNamespace(data_ptr=lambda: 0))
    monkeypatch.setattr(torch.cuda, "device", made.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: made.current)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
    return made


def test_the_event_of_a_gpu_that_is_not_the_current_one_is_recorded_on_that_gpu(runtime: Recording) -> None:
    """The default stream has the handle 0, which is that of the current device: a pipeline may be on another."""
    memory = cuda.GpuMemory.create(4096, GPUS[1].uuid, lambda memory: None)
    runtime.calls.clear()
    memory.record_event()
    assert [(name, device) for name, device, _ in runtime.calls] == [("cudaEventRecord", 1)]
    assert runtime.current == 0


def test_memory_of_a_peer_is_opened_on_the_current_gpu(runtime: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker needs no context on the pipeline's GPU, whose memory one for each worker would fill."""
    buffer = (ctypes.c_uint8 * 4096)()

    def open_memory(address: Any, memory: Any, flags: int) -> int:
        address._obj.value = ctypes.addressof(buffer)
        runtime.calls.append(("cudaIpcOpenMemHandle", runtime.current, []))
        return 0

    monkeypatch.setattr(runtime, "cudaIpcOpenMemHandle", open_memory, raising=False)
    monkeypatch.setattr(torch, "device", lambda kind, index: torch.empty(0).device)
    handle = GpuHandle(GPUS[1].uuid, 4096, bytes(64), bytes(64))
    with torch.inference_mode():
        opened = cuda.GpuMemory.open(handle)
    assert [(name, device) for name, device, _ in runtime.calls] == [
        ("cudaIpcOpenMemHandle", 0),
        ("cudaIpcOpenEventHandle", 0),
    ]
    opened.tensor(512, (2, 64), torch.float32).fill_(2.0)  # outside of inference mode
    assert buffer[512:516] == [0, 0, 0, 64]


def test_a_handle_exposes_only_its_own_memory(runtime: Recording) -> None:
    """CUDA carves small allocations from blocks of 2 MiB, and a handle is that of the block."""
    for nbytes, size in ((1, 2 << 20), (2 << 20, 2 << 20), ((2 << 20) + 1, 4 << 20)):
        runtime.calls.clear()
        assert cuda.GpuMemory.create(nbytes, GPUS[1].uuid, lambda memory: None).nbytes == nbytes
        name, device, arguments = runtime.calls[0]
        assert (name, device, arguments[1]) == ("cudaMalloc", 1, size)


MAPS = """7f00-7f01 r-xp 00000000 08:01 12 /opt/a b/lib/libcudart.so.11.8.89
7f02-7f03 r-xp 00000000 08:01 13 /opt/a b/nvidia/cu13/lib/libcudart.so.13
7f04-7f05 r-xp 00000000 08:01 14 /opt/torch/lib/libcudart-9335f6a2.so.12
"""


@pytest.mark.parametrize(
    ("version", "path"),
    [
        ("13.0", "/opt/a b/nvidia/cu13/lib/libcudart.so.13"),
        ("12.4", "/opt/torch/lib/libcudart-9335f6a2.so.12"),
        ("11.8", "/opt/a b/lib/libcudart.so.11.8.89"),
        ("10.2", "libcudart.so.10"),
    ],
)
def test_the_runtime_of_torch_is_found_among_others_that_a_program_has_loaded(version: str, path: str) -> None:
    assert cuda._find_runtime(MAPS, version) == path


def test_a_worker_has_conditions_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every evaluation would read them from the GPU of the runs, across the link between the two."""
    worker = object.__new__(CudaDevice)
    worker.device, worker._pinned = torch.device("cpu"), {}
    monkeypatch.setattr(worker, "_synchronize", lambda: None, raising=False)
    monkeypatch.setattr(cuda_device, "pin", lambda address, nbytes: False)
    like = {"x": torch.zeros(4)}
    arena = Arena.lay_out(1, like, like, 1, 1, {"text": torch.ones(3)}, partial(LocalMemory, device=worker.device))
    shared = arena.cond["text"]
    worker.bind(1, arena)
    shared.zero_()
    assert torch.equal(arena.cond["text"], torch.ones(3))


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
    monkeypatch.setattr(placement, "GpuMemory", HostGpuMemory)
    placed = parse_devices(devices, 1, lambda: GPUS)
    made = MemoryPlacement(placed, ExecutionOptions(dispatch="sync", memory=home), 1)
    assert made.shares_gpu_memory
    for number, device in enumerate(placed):
        assert made.worker_config(number, device) is not None
    assert made.check_peer_access(1, "worker 1", "cudaIpcOpenMemHandle failed") == ""
    assert not made.on_gpu
    assert made.shares_gpu_memory is shares
    made.close()
