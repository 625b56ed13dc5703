"""Pipelines with the drafts of a device as one batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from drp.diffusers import Workers, parallelize, reference
from tests.pipelines import IMAGE, PIPELINES, run
from tests.tiny.builders import MixingConv, pooled, prompts, sdxl


@pytest.fixture(scope="module")
def worker() -> Iterator[Workers]:
    with Workers(1, threads=1, drafts_per_device=3) as made:
        yield made


@pytest.mark.parametrize("name", ["SDXL", "Flux", "DiT"])
def test_a_worker_evaluates_a_round_as_one_batch(name: str, worker: Workers) -> None:
    make, options = PIPELINES[name]
    pipe = make()
    with reference(pipe, mode="aggressive", drafts_per_device=3) as parallel:
        expected = run(pipe, options)
    (report,) = parallel.report.calls
    assert not report.sequential
    assert report.rounds < report.steps
    assert not any("one after the other" in note for note in report.notes)
    with parallelize(pipe, worker, "aggressive") as parallel:
        assert torch.equal(run(pipe, options), expected)
    assert parallel.report.calls[0].rounds == report.rounds


def test_drafts_whose_samples_would_depend_on_each_other_are_evaluated_alone(worker: Workers) -> None:
    pipe = sdxl()
    pipe.unet.conv_in = MixingConv(pipe.unet.conv_in)
    options = {**prompts(1, 6, 8), **pooled(), **IMAGE}
    with reference(pipe, devices=3, mode="aggressive"):
        alone = run(pipe, options)
    with parallelize(pipe, worker, "aggressive") as parallel:
        assert torch.equal(run(pipe, options), alone)
    notes = parallel.report.calls[0].notes
    assert "drafts of a device are evaluated one after the other: the samples of a batch depend on each other" in notes
