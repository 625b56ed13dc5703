"""A soak: workers are killed at random, starting ones too, while runs go on; every result has the same bits.

DRP_SOAK_SECONDS says how long, DRP_SOAK_PAUSE the mean seconds between two kills. `make soak` takes ten minutes.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

import drp
from drp import Leader
from tests.conftest import leftovers, what_stays

SECONDS = float(os.environ.get("DRP_SOAK_SECONDS", "60"))
PAUSE = float(os.environ.get("DRP_SOAK_PAUSE", "1"))
WORKERS = 4
PATIENCE = 180.0
"""Seconds that a run may take: for a while there may be no worker that has not been killed."""
MODEL = "tests.denoisers:make_slow_sine"
MODES = ("aggressive", "conservative", "adaptive", "rolling", "sequential")

pytestmark = [pytest.mark.faults, pytest.mark.timeout(SECONDS + PATIENCE + 120)]


def kill_now_and_then(leader: Leader, end: threading.Event, killed: Counter[str]) -> None:
    draws = random.Random(7)
    while not end.wait(draws.uniform(0.5, 1.5) * PAUSE):
        workers = [worker for worker in leader.workers if worker.pid is not None]
        if workers:
            victim = draws.choice(workers)
            with suppress(ProcessLookupError):
                os.kill(victim.pid or 0, signal.SIGKILL if draws.random() < 0.9 else signal.SIGSTOP)
                killed[victim.state] += 1


def use() -> tuple[int, int, int]:
    own = psutil.Process()
    return own.num_fds(), len(Path("/proc/self/maps").read_text().splitlines()), own.memory_info().rss


def test_runs_outlive_their_workers() -> None:
    before = leftovers()
    requests = [
        {"shape": (5,), "steps": 30, "mode": mode, "drafts": WORKERS, "seed": seed} for mode in MODES for seed in (1, 2)
    ]
    expected = [drp.reference(MODEL, **request).samples for request in requests]  # type: ignore[arg-type]  # options
    killed: Counter[str] = Counter()
    runs, hurt, waited = 0, 0, 0.0
    end = threading.Event()
    with Leader(MODEL, devices=WORKERS, draft_timeout=3.0) as leader:
        for request in requests:
            leader.sample(**request)  # type: ignore[arg-type]  # likewise
        used = use()
        killer = threading.Thread(target=kill_now_and_then, args=(leader, end, killed))
        killer.start()
        try:
            began = time.monotonic()
            while time.monotonic() - began < SECONDS:
                which = runs % len(requests)
                started = time.monotonic()
                result = leader.submit(**requests[which]).result(PATIENCE)  # type: ignore[arg-type]  # likewise
                waited = max(waited, time.monotonic() - started)
                assert torch.equal(result.samples, expected[which]), f"run {runs}: {requests[which]}"
                runs += 1
                hurt += bool(result.incidents)
        finally:
            end.set()
            killer.join(10)
        lost = sum(worker.losses for worker in leader.workers)
        deadline = time.monotonic() + 60
        while [w.state for w in leader.workers] != ["ready"] * WORKERS and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [w.state for w in leader.workers] == ["ready"] * WORKERS
        gained = [new - old for new, old in zip(use(), used, strict=True)]
    assert runs > 0
    assert hurt > 0
    assert gained[0] <= 2, f"{gained} descriptors, maps and bytes more"
    assert gained[2] < 30_000_000, f"{gained} descriptors, maps and bytes more"
    print(  # noqa: T201  # figures for who runs it with -s
        f"{SECONDS:g} s: {sum(killed.values())} kills {dict(killed)}, {lost} workers lost, {runs} runs, {hurt} of them "
        f"hurt, all with the same bits; the longest took {waited:.1f} s; gained {gained} descriptors, maps, bytes"
    )
    assert not what_stays(before)
