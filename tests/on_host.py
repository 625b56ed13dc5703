"""The host in the place of a GPU: leader, workers and messages as they are, with a memfd where CUDA IPC would be.

What is left out is what only a GPU can do: its streams, and the replay of captured graphs. `python -m tests.on_host` is
the interpreter of such workers; every step of theirs that is worth knowing goes to the file that DRP_TEST_STEPS names.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    gc.disable()  # as in other workers, until their entry enables it

import torch
from torch import Tensor, nn
from torch.cuda import nvtx

from drp import ModelSpec, doctor_peer
from drp.errors import CudaError
from drp.leader import ExecutionOptions, options
from drp.leader.devices import Device, parse_devices
from drp.leader.gpus import Gpu
from drp.leader.memory import placement
from drp.leader.supervision import startup
from drp.models import gpu as models_gpu
from drp.protocol.arena import Arena
from drp.protocol.handles import GpuHandle, Handle
from drp.protocol.memory import Memory, SharedMemory
from drp.protocol.messages import GpuConfig
from drp.workers import cuda_device, weights
from tests.worker_interpreter import make_replay, run_command, write_interpreter

SYNC = ExecutionOptions(dispatch="sync")  # Asynchronous runs need CUDA streams.

GPUS = (Gpu(0, "GPU-00000000-first"), Gpu(1, "GPU-11111111-second"))
PLACE = struct.Struct("<QQQ")
SIZES = range(1 << 16, placement.MIN_BLOCK_NBYTES)
"""Bytes of memory that must be the weights': runs' is longer, all else is shorter."""


class HostGpuMemory:
    """What GpuMemory is, as far as leader and workers use it."""

    number = 0

    def __init__(self, memory: SharedMemory, handle: GpuHandle, keep: Callable[[Any], None] | None = None) -> None:
        self._memory, self._handle, self._keep = memory, handle, keep
        self.nbytes, self.device = handle.nbytes, torch.device("cpu")

    @classmethod
    def create(cls, nbytes: int, uuid: str, keep: Callable[[Any], None]) -> HostGpuMemory:
        if nbytes in SIZES and uuid in os.environ.get("DRP_TEST_FULL", ""):
            raise MemoryError(f"no {nbytes} bytes on {uuid}")
        memory = SharedMemory.create(nbytes)
        name = PLACE.pack(memory.handle.pid, memory.handle.fd, memory.nbytes).ljust(64, b"\0")
        return cls(memory, GpuHandle(uuid, memory.nbytes, name, bytes(64)), keep)

    @classmethod
    def open(cls, handle: GpuHandle) -> HostGpuMemory:
        if handle.nbytes in SIZES and number() in json.loads(os.environ.get("DRP_TEST_UNREACHED", "[]")):
            raise CudaError("cudaIpcOpenMemHandle failed: not here (1)")
        return cls(SharedMemory.open(Handle(*PLACE.unpack_from(handle.memory))), handle)

    @property
    def ipc_handles(self) -> tuple[Handle | None, GpuHandle | None]:
        return None, self._handle

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._memory.tensor(offset, shape, dtype)

    def record_event(self) -> None: ...

    def wait_event(self) -> None: ...

    def close(self, reuse: bool = True) -> None:
        if self._keep is not None and reuse:
            self._keep(self)

    def free(self) -> None:
        self._memory.close()

    free_with_tensors = free


class HostCudaDevice(cuda_device.CudaDevice):
    """A seat without a stream."""

    def __init__(self, how: GpuConfig) -> None:
        self.config, self.device = how, torch.device("cpu")
        self._opened = {}

    def warm(self, denoiser: Any) -> Any:
        step("warm")
        return super().warm(denoiser)

    def bind(self, run: int, arena: Arena) -> None: ...

    def unbind(self, run: int) -> None: ...

    def _synchronize(self) -> None: ...


def capture(
    self: models_gpu.Graphs, function: Callable[[], Any], device: torch.device, restore: Callable[[], object]
) -> tuple[Callable[[], object], Any]:
    """Capture as a GPU does, except that a replay calls the function: with the same arguments, to the same places."""
    for _ in range(models_gpu.WARM):
        function()
        restore()
    output = function()
    restore()
    step("captured")
    return make_replay(function, output), output


def invert_probe(memory: Memory) -> None:
    there = memory.tensor(0, (memory.nbytes,), torch.uint8)
    there.copy_(255 - there)


def number() -> int:
    """This worker's; -1 in the leader."""
    name = multiprocessing.current_process().name
    return int(name.split("-")[1]) if name.startswith("worker-") else -1


def step(what: str, **more: Any) -> None:
    """Note a step of this process."""
    line = json.dumps({"what": what, "pid": os.getpid(), "number": number(), **more}) + "\n"
    fd = os.open(os.environ["DRP_TEST_STEPS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line.encode())
    os.close(fd)


def inode(address: int) -> int:
    """The inode of the file that is mapped at an address, 0 for none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, found, *_ = line.split()
        start, end = (int(place, 16) for place in span.split("-"))
        if start <= address < end:
            return int(found)
    return 0


class Watched(nn.Module):
    """A linear layer that notes where its weight is whenever it is evaluated."""

    spec = ModelSpec(sample_shape=(128,))

    def __init__(self, seed: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(128, 128)
        g = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g) * 0.05
        step("loaded")

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        weight = self.layer.weight
        step("evaluated", size=len(x), dtype=str(weight.dtype), inode=inode(weight.data_ptr()))
        out: Tensor = torch.sin(self.layer(x.to(weight.dtype))).to(x.dtype) * (1 - t.to(x.dtype) / 2000)[:, None]
        return out

    def examples(self) -> list[tuple[Tensor, Tensor, dict[str, Tensor]]]:
        return [(torch.zeros(1, 128), torch.zeros(1), {})]


def make_other_dtype() -> Watched:
    """The same weights in another dtype in each process."""
    return Watched().double() if number() == 1 else Watched()


def use(monkeypatch: Any, folder: Path) -> dict[str, Any]:
    """Let leaders of this process find GPUS, and lend memory of the host for theirs; return what to give them."""

    def find(devices: Any, threads: int) -> tuple[Device, ...]:
        return parse_devices(devices, threads, lambda: GPUS)

    monkeypatch.setattr(options, "parse_devices", find)
    monkeypatch.setattr(placement, "GpuMemory", HostGpuMemory)
    monkeypatch.setattr(startup, "GpuMemory", HostGpuMemory)
    monkeypatch.setattr(placement.MemoryPlacement, "init_device", lambda self: None)
    monkeypatch.setenv("DRP_TEST_STEPS", str(folder / "steps"))
    return {"python": interpreter(folder), "execution": SYNC}


def interpreter(folder: Path) -> Path:
    """An interpreter whose processes take the GPU's part."""
    return write_interpreter(folder, "tests.on_host")


def steps(folder: Path) -> list[dict[str, Any]]:
    """What was noted, in order."""
    return [json.loads(line) for line in (folder / "steps").read_text().splitlines()]


def _stand_in() -> None:
    """Take the GPU's part in this process."""
    share = weights.Weights.share

    def noted(self: weights.Weights, memory: Memory, publish: bool) -> None:
        step("publish" if publish else "take")
        if str(number()) == os.environ.get("DRP_TEST_DIES"):
            memory.tensor(0, (64,), torch.uint8).fill_(7)  # in the middle of it
            os.kill(os.getpid(), signal.SIGKILL)
        share(self, memory, publish)

    weights.Weights.share = noted  # type: ignore[method-assign]  # the worker's own code, in the worker's own process
    nvtx.range_push = lambda name: step("range", name=name)
    nvtx.range_pop = lambda: step("end")
    vars(cuda_device).update(CudaDevice=HostCudaDevice, GpuMemory=HostGpuMemory, invert_probe=invert_probe)
    models_gpu.Graphs._capture = capture  # type: ignore[method-assign]  # the worker's own code, in the worker's own process
    vars(doctor_peer).update(GpuMemory=HostGpuMemory, invert_probe=invert_probe)
    doctor_peer._set_device = lambda uuid: None


def main() -> None:
    """Run what the leader wants run, after the GPU's part has been taken."""
    from tests import on_host  # under the name by which models are found too

    on_host._stand_in()
    run_command()


if __name__ == "__main__":
    main()
