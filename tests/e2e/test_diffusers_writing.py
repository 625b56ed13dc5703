"""A pipeline's module that writes to its buffers: workers have the bits of the reference."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import torch

from drp.diffusers import parallelize, reference
from tests.pipelines import IMAGE, prompts, run, sd15
from tests.writing import WritingLayer


def test_what_a_module_writes_is_each_workers_own() -> None:
    pipe = sd15()
    layer = pipe.unet.conv_in = WritingLayer(pipe.unet.conv_in)
    call = {**prompts(1, 6, 8), **IMAGE}
    expected, counts = [], []
    with reference(pipe, devices=2, threads=1) as parallel:
        for _ in range(2):
            expected.append(run(pipe, call, 6))
            counts.append(int(layer.count))
    assert counts == [1, 2]  # the first step of each call, which the pipeline evaluates itself
    assert not any(each.sequential for each in parallel.report.calls)
    layer.count.zero_()
    with parallelize(pipe, 2, threads=1) as parallel:
        samples = [run(pipe, call, 6) for _ in range(2)]
        assert int(layer.count) == 2
    assert not any(each.sequential for each in parallel.report.calls)
    for found, wanted in zip(samples, expected, strict=True):
        assert torch.equal(found, wanted)
