"""The check of the operating system."""

from __future__ import annotations

import sys

NAMES = {"darwin": "macOS", "win32": "Windows", "cygwin": "Windows"}
LINUX = {"macOS": "in a Linux container or virtual machine", "Windows": "in WSL 2"}


def require_linux() -> None:
    """Raise RuntimeError, with a remedy, on an operating system other than Linux."""
    if sys.platform != "linux":
        name = NAMES.get(sys.platform, sys.platform)
        raise RuntimeError(
            f"drp runs on Linux only, because processes share memory by memfd_create and CUDA IPC there, and this is "
            f"{name}; run it {LINUX.get(name, 'on Linux')}"
        )
