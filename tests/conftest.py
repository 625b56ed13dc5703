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
from tests.denoisers import make_free
from tests.waiting import until

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


@contextmanager
def dispatching(leader: Leader, dispatch: str) -> Iterator[Leader]:
    """Have a leader dispatch the runs of a block synchronously or asynchronously, so that one start does for both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leader.internals.placement, "allows_async", dispatch == "async")
        yield leader


def leftovers() -> dict[str, set[str]]:
    """Return what a leader could leave, unless it is shared: worker processes, shared memory, socket directories."""
    children = psutil.Process().children(recursive=True)
    workers = {str(child.pid) for child in children if "resource_tracker" not in " ".join(_command(child))}
    memory = {path.name for path in Path("/dev/shm").iterdir() if _is_ours(path.name, workers)}
    sockets = {path.name for path in Path(tempfile.gettempdir()).glob("drp-*")}
    descriptors = {str(target) for target in _descriptors() if "memfd:drp" in target}
    found = {"processes": workers, "/dev/shm": memory, "sockets": sockets, "memory": descriptors}
    return {what: names.difference(*(each.held(what) for each in shared.values())) for what, names in found.items()}


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


def _start_pipeline_workers() -> Workers:
    from drp.diffusers import Workers

    return Workers(2, threads=1)


SHARED: dict[str, Callable[[], Leader | Workers]] = {
    "one": lambda: Leader("tests.denoisers:Tiny", devices=1),
    "tiny": lambda: Leader("tests.denoisers:Tiny", devices=2),
    "free": lambda: Leader(make_free, devices=2),
    "digits": lambda: Leader("digits", devices=2),
    "pipeline_workers": _start_pipeline_workers,
}
"""How the leaders are started that all tests of a process share, by the names of their fixtures."""


class Shared:
    """A leader that tests share. They may kill its workers and change its policy: `restore` undoes that."""

    def __init__(self, name: str) -> None:
        before = leftovers()
        self.given = SHARED[name]()
        self._leader = self.given if isinstance(self.given, Leader) else self.given._leader
        self._policy = self._leader.policy
        self._held = {what: names - before[what] for what, names in leftovers().items()}

    def held(self, what: str) -> set[str]:
        """Return which of a kind of leftovers are this leader's. Its workers may be others by now."""
        return {str(worker.pid) for worker in self._leader.workers} if what == "processes" else self._held[what]

    def restore(self) -> None:
        """Wait until all workers are ready and no run is left; fail if that takes too long."""
        runs = self._leader.internals.runs
        until(
            lambda: (
                self._leader.closed
                or (
                    not runs.running
                    and not runs.draining
                    and all(each.state == "ready" for each in self._leader.workers)
                )
            ),
            seconds=3 * DEADLINE,
        )
        assert not self._leader.closed
        self._leader.timeline, self._leader.policy = None, self._policy

    def close(self) -> None:
        self.given.close()


shared: dict[str, Shared] = {}
"""The shared leaders that are running, by name."""


def share(name: str) -> Iterator[Any]:
    """Give a test a shared leader. If the test breaks it, the test fails, and the next one has a new leader."""
    if name not in shared:
        shared[name] = Shared(name)
    yield shared[name].given
    try:
        shared[name].restore()
    except AssertionError:
        shared.pop(name).close()
        pytest.fail(f"the test left the shared leader {name!r} without a worker, or with a run; it was closed")


@pytest.fixture(autouse=True, scope="session")
def _close_shared(_own_folder: None) -> Iterator[None]:
    yield
    while shared:
        shared.popitem()[1].close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """With `--dist loadfile`, run all files that share leaders in one process, so that the leaders start once.

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
    """Return what kind of shared leaders the tests of a file take as an argument, None if they take none."""
    found = re.search(rf"\b(?:{'|'.join(SHARED)}): (Leader|Workers)\b", file.read_text())
    return found[1] if found else None


@pytest.fixture(autouse=True, scope="module")
def _leave_nothing() -> Iterator[None]:
    """Fail the module that leaves a process, shared memory or a socket behind."""
    before = leftovers()
    yield
    assert not what_stays(before, "memfd:drp-run" if shared else None)  # Shared leaders keep memory of runs.


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


@pytest.fixture
def one() -> Iterator[Leader]:
    """One worker with the tiny denoiser."""
    yield from share("one")


@pytest.fixture
def tiny() -> Iterator[Leader]:
    """Two workers with the tiny denoiser."""
    yield from share("tiny")


@pytest.fixture
def free() -> Iterator[Leader]:
    """Two workers with a denoiser that takes any shape, and a condition `shift`."""
    yield from share("free")


@pytest.fixture
def digits() -> Iterator[Leader]:
    """Two workers with the trained digits."""
    yield from share("digits")


@pytest.fixture
def pipeline_workers() -> Iterator[Workers]:
    """Two workers for pipelines, which import diffusers as they start."""
    yield from share("pipeline_workers")
