"""A CUDA device that is the host, so that the tests of GPUs run where there is none.

`make test-host-cuda` builds `device.cpp` against torch's CPU build and runs tests/gpu/test_pipelines.py on it:

    device.cpp        tensors on "cuda:0" to "cuda:3" in the host's memory; mixing devices raises, as on a GPU
    torch_cuda.py     the functions of torch.cuda
    cuda_runtime.py   the functions of CUDA's runtime and driver that drp calls; shared memory where CUDA IPC would be
    plugin.py         has a pytest process, or a worker, use all of these

What only a GPU can show is left out: streams and their order, captured graphs, the compiler, limits of memory, peers,
and the bits of its kernels.
"""

from pathlib import Path

LIBRARY = Path(__file__).parents[2] / "build/host_cuda/device.so"
