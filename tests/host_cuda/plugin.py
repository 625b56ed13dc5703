"""A plugin of pytest: `pytest -p tests.host_cuda.plugin`. Workers run `python -m tests.host_cuda.plugin`."""

from __future__ import annotations

import gc
import sys

if __name__ == "__main__":
    gc.disable()  # as in other workers, until their entry enables it

from tests.host_cuda import LIBRARY, torch_cuda  # before torch

torch_cuda.install()

from tests.host_cuda import cuda_runtime  # noqa: E402  # drp looks for CUDA at its import

cuda_runtime.install()

import pytest  # noqa: E402


def pytest_configure() -> None:
    """Check that devices are kept apart, and have leaders start workers that use the same devices."""
    from multiprocessing import spawn

    import torch

    with pytest.raises(RuntimeError, match="two devices, cuda:1 and cpu"):
        torch.ones(2, device="cuda:1").add(torch.ones(2))

    path = LIBRARY.with_name("python")
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.host_cuda.plugin "$@"\n')
    path.chmod(0o755)
    spawn.set_executable(str(path))


def main() -> None:
    """Run what the leader wants run, as an interpreter would."""
    at = sys.argv.index("-c")
    boot = sys.argv[at + 1]
    sys.argv = ["-c", *sys.argv[at + 2 :]]
    exec(boot, {"__name__": "__main__"})


if __name__ == "__main__":
    main()
