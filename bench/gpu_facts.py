"""What a GPU session runs on: `python -m bench.gpu_facts`. It names what is missing before anything is measured.

Printed are the versions of packages, the environment, what nvidia-smi says, and `drp doctor`, which has another process
open GPU memory. The exit status is 1 if a package or the GPU is missing, or if the doctor finds something in the way.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "zmq": "pyzmq",
    "msgpack": "msgpack",
    "psutil": "psutil",
    "safetensors": "safetensors",
    "click": "click",
    "rich": "rich",
    "PIL": "pillow",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "pytest": "pytest",
    "pytest_timeout": "pytest-timeout",
    "pytest_benchmark": "pytest-benchmark",
    "hypothesis": "hypothesis",
}
"""The packages that the session's parts import, by module, and their distributions."""
ONLY_ON_GPUS = {"triton"}
COMMANDS = (("nvidia-smi",), ("nvidia-smi", "-L"), ("nvidia-smi", "topo", "-m"))
TIMEOUT = 20.0
"""Seconds for each of these commands."""


def missing_packages() -> list[str]:
    """Print the versions of packages; return those that are missing."""
    missing = []
    for module, package in PACKAGES.items():
        found = importlib.util.find_spec(module) is not None
        try:
            which = version(package) if found else "MISSING"
        except PackageNotFoundError:
            which = "of unknown version"
        print(f"  {package:20}{which}")
        if not found and module not in ONLY_ON_GPUS:
            missing.append(package)
    return missing


def print_environment() -> None:
    """Print the machine and the variables that CUDA, torch and drp read."""
    print(
        f"python {platform.python_version()} at {sys.executable}, kernel {platform.release()}, {os.cpu_count()} cores"
    )
    print(f"user {os.getuid()}, may use cores {sorted(os.sched_getaffinity(0))}")
    for name, value in sorted(os.environ.items()):
        if name.startswith(("CUDA", "NVIDIA", "PYTORCH", "TORCH", "TRITON", "OMP", "DRP", "LD_LIBRARY")):
            print(f"  {name}={value}")


def print_driver() -> None:
    """Print what NVIDIA's tool says."""
    for command in COMMANDS:
        print(f"\n{' '.join(command)}", flush=True)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)  # noqa: S603  # as above
            print(done.stdout + done.stderr, end="")
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"  cannot be run: {error}")


def print_torch() -> None:
    """Print what torch sees of the GPUs."""
    import torch

    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]  # torch has no types for it
    print(f"\ntorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name, where = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
            print(f"  cuda:{index} {name}, sm_{where[0]}{where[1]}, {free >> 20} of {total >> 20} MiB free")


def in_the_way() -> list[str]:
    """Run and print `drp doctor`; return what prevents drp from working on a GPU here."""
    from rich.console import Console

    from drp.cli.doctor_tables import tables
    from drp.doctor import examine

    report = examine()
    Console(width=120).print(*tables(report))
    bad = [f"{finding.about}: {finding.seen}" for finding in report.bad]
    for row, (gpu, reached) in enumerate(zip(report.gpus, report.ipc, strict=True)):
        if reached[row] != "works":
            bad.append(f"memory of cuda:{gpu.index} is not opened by another process: {reached[row]}")
    return bad if report.gpus else [*bad, "there is no GPU"]


def main() -> int:
    """Print all; return the exit status."""
    print_environment()
    problems = [f"the package {name} is missing" for name in missing_packages()]
    print_driver()
    if not problems:
        sys.stdout.flush()
        print_torch()
        problems = in_the_way()
    for problem in problems:
        print(f"PROBLEM: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
