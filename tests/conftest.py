"""What every test is held to: it leaves nothing behind."""

from __future__ import annotations

import gc
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest
import torch

from drp import Leader

DEADLINE = 10.0


gc.disable()  # until all tests are imported: what imports make stays, and to go through it again and again takes time


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but not among what was imported."""
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from tests that are not about them: a count of devices is one of cores there."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# How fast inputs are made says something about the machine, not about what is tested.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for it; fail if it takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Have torch use one thread in this process, as workers do: bits depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def leftovers() -> dict[str, set[str]]:
    """Return what a leader could leave: worker processes, shared memory, socket directories."""
    children = psutil.Process().children(recursive=True)
    workers = {str(child.pid) for child in children if "resource_tracker" not in " ".join(_command(child))}
    memory = {path.name for path in Path("/dev/shm").iterdir() if _is_ours(path.name, workers)}
    sockets = {path.name for path in Path(tempfile.gettempdir()).glob("drp-*")}
    descriptors = {str(target) for target in _descriptors() if "memfd:drp" in target}
    return {"processes": workers, "/dev/shm": memory, "sockets": sockets, "memory": descriptors}


def _is_ours(name: str, workers: set[str]) -> bool:
    """Whether a file in /dev/shm is drp's or of torch in one of these processes: those of other programs do not count.

    torch calls its files torch_PID_..., so one of a worker that is gone is known by a process that there is no more.
    """
    pid = re.match(r"torch_(\d+)_", name)
    return name.startswith("drp") or (
        pid is not None and (pid[1] in {*workers, str(os.getpid())} or not psutil.pid_exists(int(pid[1])))
    )


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return ["resource_tracker"]  # gone, which is as good


def _descriptors() -> list[str]:
    found = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            found.append(f"{path.name} {path.readlink()}")
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


@pytest.fixture(autouse=True, scope="session")
def _own_folder() -> Iterator[None]:
    """Give the tests a temporary folder of their own: other programs' files are not theirs to count."""
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        tempfile.tempdir = os.environ["TMPDIR"] = folder  # this process's, and those of programs it starts
        yield
    tempfile.tempdir = before[0]
    if before[1] is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before[1]


@pytest.fixture(autouse=True, scope="module")
def _leave_nothing() -> Iterator[None]:
    """Fail the module that leaves a process, shared memory or a socket behind."""
    before = leftovers()
    yield
    assert not what_stays(before)


def what_stays(before: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return what is there and was not before, and is still there at the deadline."""
    deadline = time.monotonic() + DEADLINE
    stays: dict[str, set[str]] | None = None
    while True:
        gc.collect()  # memory stays mapped while a tensor in it lives
        new = {what: left - before[what] for what, left in leftovers().items()}
        # Other programs may come and go too: what counts is what was there every time.
        stays = new if stays is None else {what: left & new[what] for what, left in stays.items()}
        stays = {what: left for what, left in stays.items() if left}
        if not stays or time.monotonic() > deadline:
            return stays
        time.sleep(0.05)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Leader]:
    """Two workers with the tiny denoiser."""
    with Leader("tests.denoisers:Tiny", devices=2) as leader:
        yield leader
