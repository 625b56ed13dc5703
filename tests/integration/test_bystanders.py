"""One caller's code and data may fail in any way: it ends that caller's run, never the leader or another's run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import drp
from drp import Leader
from drp.leader.scheduling.policies import Policy, Waiting
from drp.sampling.grids import scaled_linear
from drp.sampling.result import Result
from drp.sampling.solvers import DDIM
from tests.conftest import dispatching
from tests.denoisers import make_free

DEADLINE = 60.0
SLOW: dict[str, Any] = {"shape": (3, 4), "cond": {"seconds": torch.tensor(0.02)}}
OPTIONS: dict[str, Any] = {"steps": 20, "seed": 5, **SLOW}


@pytest.fixture(params=["sync", "async"])
def leader(free: Leader, request: pytest.FixtureRequest) -> Iterator[Leader]:
    with dispatching(free, request.param) as leader:
        yield leader


@pytest.fixture(scope="module")
def expected() -> Tensor:
    """The samples of the run beside the one that fails."""
    return drp.reference(make_free, devices=2, **OPTIONS).samples


class Unusual(BaseException):
    """As pytest.fail and others raise: no Exception."""


@pytest.mark.parametrize(
    "kind", [ValueError, SystemExit, KeyboardInterrupt, Unusual, StopIteration, GeneratorExit], ids=lambda k: k.__name__
)
def test_what_a_callback_raises_ends_its_own_run(leader: Leader, expected: Tensor, kind: type[BaseException]) -> None:
    error = kind(2)  # made here: its traceback holds the run's memory

    def callback(k: int, state: Tensor) -> None:
        if k == 3:
            raise error

    bystander = leader.submit(**OPTIONS)
    with pytest.raises(kind) as caught:
        leader.submit(**SLOW, steps=12, callback=callback).result(DEADLINE)
    assert caught.value is error
    assert torch.equal(bystander.result(DEADLINE).samples, expected)


def test_what_a_done_callback_raises_is_logged_and_others_are_called(
    leader: Leader, expected: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[Future[Result]] = []

    def leave(future: Future[Result]) -> None:
        raise SystemExit(3)

    bystander = leader.submit(**OPTIONS)
    pending = leader.submit(**SLOW, steps=12)
    pending.add_done_callback(leave)
    pending.add_done_callback(called.append)
    pending.result(DEADLINE)
    assert torch.equal(bystander.result(DEADLINE).samples, expected)
    assert called == [pending]
    assert "a done-callback raised" in caplog.text


def test_a_result_that_cannot_be_made_is_the_runs_error(leader: Leader, expected: Tensor) -> None:
    out = torch.zeros(1, 3, 4)
    bystander = leader.submit(**OPTIONS)
    pending = leader.submit(**SLOW, steps=12, out=out)
    out.resize_(1)
    with pytest.raises(RuntimeError, match="shape"):
        pending.result(DEADLINE)
    assert torch.equal(bystander.result(DEADLINE).samples, expected)


@pytest.mark.parametrize("fine", [0, 5])
def test_what_no_message_can_hold_ends_the_run_that_asks_for_it(
    leader: Leader, expected: Tensor, fine: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timestep of somebody's own grid, beyond what the protocol's numbers go up to.

    If it is that of the first draft, no worker is told of the run, whose memory is freed at once.
    """
    monkeypatch.setattr(leader.internals.placement.buffer_pool, "_max_nbytes", 0)
    losses = [worker.losses for worker in leader.workers]
    grid = scaled_linear(12)
    grid = replace(grid, timesteps=np.where(np.arange(12) < fine, grid.timesteps, 1e12))
    bystander = leader.submit(**OPTIONS)
    with pytest.raises(drp.ProtocolError, match="1000000000000"):
        leader.submit(**SLOW, solver=DDIM(grid)).result(DEADLINE)
    assert torch.equal(bystander.result(DEADLINE).samples, expected)
    assert [worker.losses for worker in leader.workers] == losses


@pytest.mark.parametrize(
    ("cond", "words"),
    [
        ({"\udcff": torch.zeros(1)}, "lone surrogates"),
        ({"": torch.zeros(1)}, "cond has the name ''; give names of 1 to 200 characters"),
        ({1: torch.zeros(1)}, "cond has the name 1; give names"),
        ({"a": [1.0]}, r"cond\['a'\] is a list; cond holds tensors by name"),
        ({"a": torch.zeros([1] * 17)}, "16 sizes at most"),
        ({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "give a dense tensor of one of float64"),
        ({"a": torch.eye(3).to_sparse()}, "give a dense tensor"),
        ({"a": torch.zeros(2, device="meta")}, "give a dense tensor"),
    ],
)
def test_a_condition_that_no_message_can_hold_is_refused(leader: Leader, cond: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        leader.submit(shape=(3, 4), cond=cond)


def test_a_run_that_the_machine_has_no_memory_for_ends_before_any_is_taken(
    leader: Leader, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux would grant it, and kill processes when it is reserved."""
    monkeypatch.setattr("drp.protocol.memory.available_nbytes", lambda: 1 << 20)
    bystander = leader.submit(**OPTIONS)
    large = {"large": torch.zeros(()).expand(1 << 23)}
    with pytest.raises(MemoryError, match=r"no 335\d+ bytes of shared memory: the machine has 1048576 left; ask for"):
        leader.submit(shape=(3, 4), cond=large).result(DEADLINE)
    assert torch.equal(bystander.result(DEADLINE).samples, expected)


@dataclass(frozen=True)
class Fickle(Policy):
    """Chooses a run without a draft, or raises, as long as `wrong` says so."""

    wrong: list[str] = None  # type: ignore[assignment]  # always given

    def choose(self, worker: int, workers: int, runs: Sequence[Waiting]) -> Waiting | None:
        if self.wrong == ["raise"]:
            raise SystemExit("no policy today")
        if self.wrong == ["empty"]:
            return Empty()  # type: ignore[return-value]  # what is tested
        return super().choose(worker, workers, runs)


class Empty:
    waiting = ()


@pytest.mark.parametrize("wrong", ["raise", "empty"])
def test_a_policy_that_fails_ends_the_runs_that_it_was_to_choose_from(wrong: str, free: Leader) -> None:
    free.policy = fickle = Fickle(wrong=[wrong])
    with pytest.raises(RuntimeError, match="the policy chose no run for worker 0: "):
        free.submit(shape=(3,), steps=4).result(DEADLINE)
    fickle.wrong.clear()
    assert free.sample(shape=(3,), steps=4).steps == 4


def test_runs_whose_memory_grows_keep_few_descriptors(leader: Leader) -> None:
    import psutil

    process, before = psutil.Process(), 0
    for number in range(40):
        leader.sample(shape=(4,), steps=1, cond={"prompt": torch.zeros(600 * (number + 1))})
        if number == 4:
            before = process.num_fds()
    deadline = time.monotonic() + DEADLINE
    while process.num_fds() > before + 12:
        assert time.monotonic() < deadline
        time.sleep(0.01)
