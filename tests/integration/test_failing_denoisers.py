"""Denoisers that raise, lie, or take their workers with them: a clear error in time, and the leader goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from drp import Leader, WorkerError
from tests.conftest import dispatching
from tests.denoisers import RAISED, ill

SHAPE = (1, 4, 4)
DEADLINE = 60.0


@pytest.fixture(scope="module")
def ailing() -> Iterator[Leader]:
    """A worker whose denoiser fails as a run asks for."""
    with Leader("tests.denoisers:make_ailing") as leader:
        yield leader


@pytest.mark.parametrize("dispatch", ["sync", "async"])
def test_whatever_a_denoiser_raises_ends_its_run_and_no_worker(ailing: Leader, dispatch: str) -> None:
    """Among it errors that no message can tell as they are, and those that would end a program."""
    before = [worker.losses for worker in ailing.workers]
    with dispatching(ailing, dispatch):
        for number, error in enumerate(RAISED):
            cond = ill("make_failing_oddly") | {"raised": torch.tensor(number)}
            pending = ailing.submit(shape=SHAPE, steps=12, cond=cond)
            with pytest.raises(WorkerError, match=rf"failed evaluating step \d+ of run \d+: {type(error).__name__}"):
                pending.result(DEADLINE)
        assert ailing.sample(shape=SHAPE, steps=3).steps == 3
    assert [worker.losses for worker in ailing.workers] == before


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            "make_raising",
            r"^worker \d \(cpu:\d, process \d+\) failed evaluating step \d+ of run \d+: ArithmeticError: the "
            r"denoiser has had enough\nTraceback (.|\n)*denoisers.py\", line",
        ),
        ("make_misshapen", r"returned torch.float32 \[1, 1, 3, 4\]; it must return torch.float32 \[1, 1, 4, 4\]"),
        (
            "make_infinite",
            r"failed evaluating step \d+ of run \d+: FloatingPointError: the denoiser returned infinity in 'x'\n",
        ),
        ("make_nan", r"failed evaluating step \d+ of run \d+: FloatingPointError: the denoiser returned NaN in 'x'\n"),
    ],
)
def test_a_denoiser_that_fails_ends_its_run_only(ailing: Leader, model: str, words: str) -> None:
    before = [worker.losses for worker in ailing.workers]
    for _ in range(2):
        with pytest.raises(WorkerError, match=words):
            ailing.sample(shape=SHAPE, steps=20, cond=ill(model))
    assert [worker.losses for worker in ailing.workers] == before


def test_a_draft_that_every_worker_is_lost_with_is_a_clear_error(ailing: Leader) -> None:
    model = "make_crashing"
    with pytest.raises(WorkerError) as error:
        ailing.submit(shape=SHAPE, steps=20, cond=ill(model)).result(DEADLINE)
    assert re.match(
        r"step \d+ of run \d+ was given up, after every worker that evaluated it was lost", str(error.value)
    )
    words = r"was killed by SIGSEGV; its crash log:\n(.|\n)*denoisers.py(.|\n)* in predict"
    assert re.search(words, str(error.value)), str(error.value)
    # The leader goes on: one step, at a timestep that does no harm, once there is a worker again.
    assert ailing.submit(shape=SHAPE, steps=1, cond=ill(model)).result(DEADLINE).steps == 1
