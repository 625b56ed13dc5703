"""Discovery of GPUs, and the reason if none can be used. GPUs are queried only on request."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from drp.protocol.cuda import uuid_of

PCI = Path("/sys/bus/pci/devices")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The environment variables from which torch reads its allocator's options: the new name and the old one."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that CUDA shows this process: its index in this process, its UUID, and the cores of its NUMA node."""

    index: int
    uuid: str
    """The UUID with its prefix, as nvidia-smi -L prints it."""
    name: str = ""
    nbytes: int = 0
    bus: str = ""
    """The PCI address, such as 0000:17:00.0; empty if torch does not report it."""
    cores: tuple[int, ...] = ()
    """The cores of the GPU's NUMA node that this process may use; empty if the kernel does not report them."""
    node: int | None = None
    """The NUMA node's number; None if the kernel does not report it or has only one node."""


def has_gpus() -> bool:
    """Whether CUDA shows this process a GPU."""
    return torch.version.cuda is not None and torch.cuda.is_available()


def find_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs in CUDA's order; raise ValueError, naming cause and remedy, if none can be used."""
    if not has_gpus():
        raise ValueError(why_none(torch.__version__, torch.version.cuda, _has_driver(), os.environ))
    if not hasattr(torch.cuda.get_device_properties(0), "uuid"):
        raise ValueError(f"torch {torch.__version__} does not know the UUIDs of GPUs; install torch 2.5 or newer")
    return tuple(_describe(index) for index in range(torch.cuda.device_count()))


def why_none(version: str, cuda: str | None, driver: bool, environ: Mapping[str, str]) -> str:
    """Explain why a torch of this version, built for this CUDA version, finds no GPU."""
    if cuda is None:
        return f"torch {version} is built without CUDA; install a build with it, or use cpu devices"
    if not driver:
        return (
            f"there is no NVIDIA driver: libcuda.so.1 cannot be loaded (torch {version} is built for CUDA {cuda}); "
            "install the driver, or in a container run it with --gpus all"
        )
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return (
            f"CUDA_VISIBLE_DEVICES is {visible!r}, which leaves no GPU: it is empty, or its first entry does not exist "
            "(CUDA stops there); unset it, or name GPUs as nvidia-smi -L does"
        )
    return (
        f"the NVIDIA driver shows no GPU to torch {version} (CUDA {cuda}): there is none, or the driver is too old; "
        "nvidia-smi shows which"
    )


def visible(environ: Mapping[str, str], gpus: tuple[Gpu, ...]) -> str:
    """Describe the names of the GPUs, and how CUDA_VISIBLE_DEVICES affects them."""
    names = ", ".join(f"cuda:{gpu.index} ({gpu.uuid})" for gpu in gpus)
    setting = environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return f"there is {names}"
    listed = [entry.strip() for entry in setting.split(",")]
    kind = "by UUID " if any(entry.startswith(("GPU-", "MIG-")) for entry in listed) else ""
    short = (
        f"; CUDA shows {len(gpus)} of its {len(listed)}, for it stops at the first that does not exist"
        if len(listed) > len(gpus)
        else ""
    )
    return f"CUDA_VISIBLE_DEVICES names {kind}{setting!r}, and numbers count within it: there is {names}{short}"


def near_cores(bus: str, allowed: set[int], pci: Path = PCI) -> tuple[int, ...]:
    """Return the cores local to a PCI device that this process may use; empty if the kernel does not report them."""
    try:
        text = (pci / bus.lower() / "local_cpulist").read_text().strip()
    except OSError:
        return ()
    return tuple(sorted(parse_cores(text) & allowed))


def near_node(bus: str, pci: Path = PCI) -> int | None:
    """Return the number of a PCI device's NUMA node, None if the kernel does not report it."""
    try:
        node = int((pci / bus.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def parse_cores(text: str) -> set[int]:
    """Parse a list of cores in the kernel's format, such as `0-3,8`."""
    cores: set[int] = set()
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return cores


def _describe(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    place = [int(getattr(found, f"pci_{part}_id", -1)) for part in ("domain", "bus", "device")]
    bus = "" if min(place) < 0 else "{:04x}:{:02x}:{:02x}.0".format(*place)
    cores = near_cores(bus, os.sched_getaffinity(0)) if bus else ()
    return Gpu(index, uuid_of(index), found.name, found.total_memory, bus, cores, near_node(bus) if bus else None)


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
