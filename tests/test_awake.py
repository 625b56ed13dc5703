"""Cores kept awake: the wish is held while runs are under way, and no longer. Any file stands in for the kernel's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drp import Leader
from drp.leader import awake

TINY = "tests.denoisers:Tiny"


@pytest.fixture
def wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "latency"
    path.touch()
    monkeypatch.setattr(awake, "PATH", str(path))
    return path


def held(path: Path) -> int:
    """Return how many descriptors of this process are open on a file."""
    links = Path("/proc/self/fd").iterdir()
    return sum(link.is_symlink() and os.path.realpath(link) == str(path) for link in links)


def test_the_wish_is_held_while_runs_are_under_way(wish: Path) -> None:
    seen = []
    with Leader(TINY, awake=True) as leader:
        assert held(wish) == 0
        for _ in range(2):
            leader.sample(labels=[1], steps=3, callback=lambda step, state: seen.append(held(wish)))
        other = leader.submit(labels=[1], steps=3)
        other.cancel()
    assert seen == [1] * 6
    assert held(wish) == 0
    assert wish.read_bytes()[:4] == bytes(4)


def test_nothing_is_wished_unless_asked(wish: Path) -> None:
    with Leader(TINY) as leader:
        leader.sample(labels=[1], steps=2, callback=lambda step, state: None)
    assert wish.read_bytes() == b""


def test_a_run_that_fails_lets_the_cores_sleep_again(wish: Path) -> None:
    def fail(step: int, state: object) -> None:
        raise KeyError("the caller's")

    with Leader(TINY, awake=True) as leader:
        with pytest.raises(KeyError):
            leader.sample(labels=[1], steps=3, callback=fail)
        assert leader.sample(labels=[1], steps=2).rounds == 2
    assert held(wish) == 0


@pytest.mark.parametrize(("name", "remedy"), [("missing/file", "give the container"), (".", "udev")])
def test_where_it_cannot_be_wished_that_is_said_at_once(
    name: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(awake, "PATH", str(tmp_path / name))
    with pytest.raises(ValueError, match=f"awake=True needs .*{remedy}"):
        Leader(TINY, awake=True)


@pytest.mark.skipif(bool(awake.why_not()), reason=f"{awake.PATH} cannot be written here")
def test_the_kernel_grants_the_wish_and_takes_it_back_with_the_process() -> None:
    before, seen = wished(), []
    with Leader(TINY, awake=True) as leader:
        leader.sample(labels=[1], steps=2, callback=lambda step, state: seen.append(wished()))
    assert (seen, wished()) == ([0, 0], before)
    script = (
        f"import os, drp\nwith drp.Leader({TINY!r}, awake=True) as leader:\n    "
        "leader.sample(labels=[1], steps=2, callback=lambda step, state: os.kill(os.getpid(), 9))\n"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == -9
    assert wished() == before


def wished() -> int:
    """Return the microseconds that waking up may take for all who wish: what the kernel goes by."""
    fd = os.open(awake.PATH, os.O_RDONLY)
    try:
        return int.from_bytes(os.read(fd, 4), "little", signed=True)
    finally:
        os.close(fd)
