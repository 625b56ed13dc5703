"""Windows on workers: the bits of the reference whatever the drafts, the dispatch and the policy, and after a loss."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

import drp
from drp import Leader
from tests.conftest import dispatching
from tests.denoisers import make_free

ASKED: list[dict[str, Any]] = [
    *({"drafts": n} for n in range(2, 9)),
    {"drafts": 8, "stride": 3.5, "solver": "dpmsolver++"},
    {"drafts": 5, "offsets": "even", "solver": "unipc"},
    {"drafts": 8, "offsets": "tapered", "stride": 6, "solver": "ddpm"},
    {"drafts": 4, "offsets": [1, 3, 4, 9], "warmup": 2},
    {"drafts": 6, "sweeps": 1},
    {"drafts": 8, "target_rounds": 9},
    {"drafts": 4, "target_rounds": 8},  # the fewest, with gaps
]


@pytest.mark.parametrize("dispatch", ["sync", "async"])
@pytest.mark.parametrize("policy", ["barrier", "eager"])
def test_bits_rounds_and_evaluations_are_the_references(free: Leader, policy: str, dispatch: str) -> None:
    free.policy = policy
    for options in ASKED:
        common = {"count": 2, "shape": (3, 2), "steps": 29, **options}
        with dispatching(free, dispatch) as leader:
            run, ref = leader.sample(**common), drp.reference(make_free, **common)
        assert torch.equal(run.samples, ref.samples), options
        assert run.dispatch == dispatch
        assert (run.evaluations, run.evaluated) == (ref.evaluations, ref.evaluated), options
        assert run.rounds <= ref.rounds if policy == "eager" else run.rounds == ref.rounds


@pytest.mark.parametrize(
    ("dispatch", "options"), [("sync", {"drafts": 5, "offsets": "even"}), ("async", {"drafts": 8})]
)
def test_a_lost_worker_changes_no_bit(free: Leader, dispatch: str, options: dict[str, Any]) -> None:
    common: dict[str, Any] = {"shape": (3,), "steps": 24, "cond": {"seconds": torch.tensor(0.02)}, **options}

    def kill(k: int, state: torch.Tensor) -> None:
        if k == 9:
            pid = free.workers[1].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)

    with dispatching(free, dispatch) as leader:
        run = leader.submit(**common, callback=kill).result(60)
    ref = drp.reference(make_free, **common)
    assert torch.equal(run.samples, ref.samples)
    assert (run.rounds, run.evaluated, run.dispatch) == (ref.rounds, ref.evaluated, dispatch)
    assert "SIGKILL" in run.incidents[0]
