"""The device on which a pipeline runs, and those on which workers need its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from drp.diffusers.publish import GpuWeights
from drp.leader.devices import Device, parse_devices
from drp.leader.gpus import find_gpus
from drp.protocol.cuda import uuid_of


def device_of(pipe: Any, names: Sequence[str]) -> torch.device:
    """Return the device on which a pipeline runs; `names` are the names of its denoising modules."""
    device = getattr(pipe, "_execution_device", None)  # An offloaded module is moved there only while it runs.
    if device is None:
        device = next((parameter.device for parameter in getattr(pipe, names[0]).parameters()), torch.device("cpu"))
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def move_to_gpu(pipe: Any, devices: int | str | Sequence[str]) -> None:
    """Move a pipeline from the host to the first GPU among the workers' devices, if there is one.

    This is for pipelines that drp loads by name; a program moves its pipeline itself.
    """
    gpus = [device.gpu for device in parse_devices(devices, 1) if device.gpu is not None]
    modules = [name for name, component in pipe.components.items() if isinstance(component, torch.nn.Module)]
    if gpus and device_of(pipe, modules).type == "cpu":
        pipe.to(torch.device("cuda", next(gpu.index for gpu in find_gpus() if gpu.uuid == gpus[0])))


def gpu_of(device: torch.device) -> str | None:
    """Return the UUID of a GPU, None for the host."""
    return uuid_of(device.index) if device.type == "cuda" else None


def refuse_other_kind(device: torch.device, workers: Sequence[Device]) -> None:
    """Raise ValueError if a pipeline on this device could not give its weights to the workers on this machine."""
    if local := [worker.gpu for worker in workers if worker.remote is None]:
        weights_of(gpu_of(device), local, ipc=False)


def weights_of(home: str | None, workers: Sequence[str | None], ipc: bool) -> GpuWeights | None:
    """Return the GPUs that need the weights: `home`, that of the pipeline, and those of the workers; None for the host.

    Raises ValueError if only the pipeline is on a GPU, or only the workers are.
    """
    gpus = list(dict.fromkeys(gpu for gpu in workers if gpu is not None))
    if home is None and gpus:
        raise ValueError(
            "the pipeline is on the CPU and its workers are on GPUs; move it first: pipe.to('cuda'), or "
            "pipe.enable_model_cpu_offload()"
        )
    if home is not None and not gpus:
        raise ValueError("the pipeline is on a GPU and its workers are not; name GPUs, such as devices='2xcuda:0'")
    return None if home is None else GpuWeights(home, tuple(gpu for gpu in gpus if gpu != home), ipc)
