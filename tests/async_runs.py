"""Leaders that dispatch asynchronously, workers that misbehave on order, and what a run hands out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import drp
from drp import ExecutionOptions, Leader
from drp.leader.memory.placement import MemoryPlacement
from tests.waiting import until

DEVICE = ExecutionOptions(dispatch="async")

TINY = "tests.denoisers:Tiny"
MODEL = "tests.misbehaving:make"
PLAIN = "tests.misbehaving:make_plain"
STEPS = 20
DEADLINE = 60.0


class Misbehaving:
    """A leader whose workers do what a test tells them."""

    def __init__(self, leader: Leader, orders: Path) -> None:
        self.leader, self._orders = leader, orders

    def tell(self, what: str, path: Path, **more: object) -> Leader:
        """Have a run misbehave; return the leader."""
        written = self._orders.with_suffix(".new")
        written.write_text(json.dumps({"what": what, "path": str(path), **more}))
        written.replace(self._orders)
        return self.leader

    def behave(self) -> None:
        """Take the orders back, and wait until all workers are ready again and no run is left."""
        self._orders.unlink(missing_ok=True)
        until(lambda: [worker.state for worker in self.leader.workers] == ["ready"] * 2)
        until(lambda: not self.leader.internals.runs.running and not self.leader.internals.runs.draining)


@contextmanager
def misbehaving_workers(folder: Path, devices: int = 2) -> Iterator[Misbehaving]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRP_TEST_ORDERS", str(folder / "orders"))  # also in the environment of workers that are replaced
        with Leader(MODEL, devices=devices, draft_timeout=3.0, execution=DEVICE) as leader:
            yield Misbehaving(leader, folder / "orders")


def acknowledge(monkeypatch: pytest.MonkeyPatch, leader: Leader, acknowledges: bool, size: int) -> None:
    """Let workers say that a draft is queued, as those have to whose records have no numbers, or let them not.

    A run of another size follows: what workers keep of the run before is of the old kind.
    """
    monkeypatch.setattr(MemoryPlacement, "workers_acknowledge", acknowledges)
    options: dict[str, Any] = {"labels": [0] * size} if leader.spec.classes else {"shape": (3 + size,)}
    leader.sample(steps=2, **options)
    until(lambda: not leader.internals.runs.draining)


class Steps:
    """A callback that keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[tuple[int, torch.Tensor]] = []

    def __call__(self, k: int, x: torch.Tensor) -> None:
        self.given.append((k, x.clone()))

    def equals(self, other: Steps) -> bool:
        same = [k == j and torch.equal(x, y) for (k, x), (j, y) in zip(self.given, other.given, strict=False)]
        return len(self.given) == len(other.given) and all(same)


def expected(mode: str = "aggressive", seed: int = 0, drafts: int = 2) -> torch.Tensor:
    return drp.reference(PLAIN, shape=(3,), steps=STEPS, mode=mode, drafts=drafts, seed=seed).samples
