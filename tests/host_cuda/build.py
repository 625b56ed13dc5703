"""Compile device.cpp against the installed torch: `python -m tests.host_cuda.build`."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from tests.host_cuda import LIBRARY

SOURCE = Path(__file__).with_name("device.cpp")


def main() -> None:
    """Compile the library unless it is newer than its source and torch."""
    if LIBRARY.exists() and LIBRARY.stat().st_mtime > max(Path(p).stat().st_mtime for p in (SOURCE, torch.__file__)):
        return
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    command = ["g++", "-O1", "-std=c++20", "-fPIC", "-shared", "-w", "-DTORCH_EXTENSION_NAME=host_cuda"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    command += [f"-I{path}" for path in (*include_paths(), sysconfig.get_paths()["include"])]
    command += [str(SOURCE), "-o", str(LIBRARY)]
    command += [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    command += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
