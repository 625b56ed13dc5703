"""What every test is held to: it leaves nothing behind."""

from __future__ import annotations

import functools
import gc
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import psutil
import pytest
import torch

from drp import Leader

if TYPE_CHECKING:
    from drp.diffusers import Workers

DEADLINE = 10.0


# As workers have: bits depend on the number. And threads that wait for work spin on the cores that workers need.
torch.set_num_threads(1)
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


@contextmanager
def dispatching(leader: Leader, dispatch: str) -> Iterator[Leader]:
    """Have a leader dispatch the runs of a block synchronously or asynchronously, so that one start does for both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leader.internals.placement, "allows_async", dispatch == "async")
        yield leader


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


SHARED = ("tiny", "digits", "pipeline_workers")
"""Session-scoped fixtures that start workers. No test may kill these: it would take them from all others."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """With `--dist loadfile`, run all files that share workers in one process, so that the workers start once.

    Marks for `--dist loadgroup` would do, but pytest-xdist 3.8 does not see them with pytest 9.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]  # it has no types

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]  # likewise
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return shared_by(config.rootpath / file) or file

    return Scheduling(config, log)


@functools.cache
def shared_by(file: Path) -> str | None:
    """Return the shared workers that the tests of a file take as an argument, None if there are none."""
    text = file.read_text()
    return next((name for name in SHARED if re.search(rf"\b{name}: (Leader|Workers)\b", text)), None)


@pytest.fixture(autouse=True, scope="module")
def _leave_nothing(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the module that leaves a process, shared memory or a socket behind."""
    shared = shared_by(request.path)
    if shared is not None:
        request.getfixturevalue(shared)  # started before the first look
    before = leftovers()
    yield
    assert not what_stays(before, "memfd:drp-run" if shared else None)  # The workers that stay keep memory of runs.


def what_stays(before: dict[str, set[str]], but: str | None = None) -> dict[str, set[str]]:
    """Return what is there and was not before, and is still there at the deadline, except names that contain `but`."""
    deadline = time.monotonic() + DEADLINE
    stays: dict[str, set[str]] | None = None
    while True:
        gc.collect()  # memory stays mapped while a tensor in it lives
        new = {
            what: {name for name in left - before[what] if but is None or but not in name}
            for what, left in leftovers().items()
        }
        # Other programs may come and go too: what counts is what was there every time.
        stays = new if stays is None else {what: left & new[what] for what, left in stays.items()}
        stays = {what: left for what, left in stays.items() if left}
        if not stays or time.monotonic() > deadline:
            return stays
        time.sleep(0.05)


@pytest.fixture(scope="session")
def tiny() -> Iterator[Leader]:
    """Two workers with the tiny denoiser."""
    with Leader("tests.denoisers:Tiny", devices=2) as leader:
        yield leader


@pytest.fixture(scope="session")
def digits() -> Iterator[Leader]:
    """Two workers with the trained digits."""
    with Leader("digits", devices=2) as leader:
        yield leader


@pytest.fixture(scope="session")
def pipeline_workers() -> Iterator[Workers]:
    """Two workers for pipelines, which import diffusers as they start."""
    from drp.diffusers import Workers

    with Workers(2, threads=1) as workers:
        yield workers
