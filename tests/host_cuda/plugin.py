"""A plugin of pytest: `pytest -p tests.host_cuda.plugin`. Workers run `python -m tests.host_cuda.plugin`."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # as in other workers, until their entry enables it

from tests.host_cuda import LIBRARY, torch_cuda  # before torch

torch_cuda.install()

from tests.host_cuda import cuda_runtime  # noqa: E402  # drp looks for CUDA at its import

cuda_runtime.install()

import pytest  # noqa: E402

from tests.worker_interpreter import run_command, write_interpreter  # noqa: E402


def pytest_configure() -> None:
    """Check that devices are kept apart, and have leaders start workers that use the same devices."""
    from multiprocessing import spawn

    import torch

    with pytest.raises(RuntimeError, match="two devices, cuda:1 and cpu"):
        torch.ones(2, device="cuda:1").add(torch.ones(2))

    spawn.set_executable(str(write_interpreter(LIBRARY.parent, "tests.host_cuda.plugin")))


if __name__ == "__main__":
    run_command()
