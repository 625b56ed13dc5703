"""Devices: on which one a pipeline runs, and on which ones the weights of its modules are to lie for the workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from drp.diffusers.publish import GpuWeights
from drp.leader.devices import parse_devices
from drp.leader.gpus import find_gpus
from drp.protocol.cuda import uuid_of


def device_of(pipe: Any, names: Sequence[str]) -> torch.device:
    """Return the device that a pipeline runs on; `names` are those of its denoising modules."""
    device = getattr(pipe, "_execution_device", None)  # which it may only be brought to while it runs
    if device is None:
        device = next((parameter.device for parameter in getattr(pipe, names[0]).parameters()), torch.device("cpu"))
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def move_to_gpu(pipe: Any, devices: int | str | Sequence[str]) -> None:
    """Move a pipeline that is on the host to the first GPU among the workers' devices, if there is one.

    This is for pipelines that drp loads by their name. A program moves its pipeline itself.
    """
    gpus = [device.gpu for device in parse_devices(devices, 1) if device.gpu is not None]
    modules = [name for name, component in pipe.components.items() if isinstance(component, torch.nn.Module)]
    if gpus and device_of(pipe, modules).type == "cpu":
        pipe.to(torch.device("cuda", next(gpu.index for gpu in find_gpus() if gpu.uuid == gpus[0])))


def gpu_of(device: torch.device) -> str | None:
    """Return the UUID of a GPU, None for the host."""
    return uuid_of(device.index) if device.type == "cuda" else None


def weights_of(home: str | None, workers: Sequence[str | None], ipc: bool) -> GpuWeights | None:
    """Return where weights are to lie: on the pipeline's GPU `home` and those of the workers; None for the host.

    Raises ValueError if the pipeline is on a GPU and the workers are not, or the other way round.
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
