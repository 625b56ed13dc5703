"""The branches of classifier-free guidance on different devices, and guidance that ends during a call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from drp.diffusers import Workers
from tests.drafting import CHEAP, EVERY, parallelize, reference
from tests.pipelines import run
from tests.rounds import rounds_of
from tests.tiny.builders import MixingConv, sdxl


@pytest.fixture
def workers(pipeline_workers: Workers) -> Workers:
    return pipeline_workers


BATCHES = [
    "SD 1.5",
    "SD 2.1",
    "SDXL",
    "SD 3",
    "PixArt",
    "Sana",
    "LTX-Video",
    "CogVideoX",
    "ControlNet",
    "wider than high",
]

CALLS = ["Flux, true CFG", "Qwen-Image", "Wan"]


@pytest.mark.parametrize("name", [*BATCHES, *CALLS])
def test_the_branches_of_guidance_on_different_devices(name: str, workers: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    with parallelize(pipe, workers, drafts=2):
        together = run(pipe, options)
    with reference(pipe, devices=4, split_guidance=True):
        expected = run(pipe, options)
    with parallelize(pipe, workers, drafts=2, split_guidance=True) as parallel:
        apart = run(pipe, options)
    (report,) = parallel.report.calls
    assert torch.equal(apart, expected)
    assert not report.notes
    assert report.rounds == rounds_of("aggressive", report.steps, 2)
    assert report.evaluations == report.steps
    if name in CALLS:
        assert torch.equal(apart, together)
    assert float((apart - together).norm() / together.norm()) < 1e-4


@pytest.mark.parametrize("name", ["Flux", "DiT", "two in a batch, no guidance"])
def test_guidance_without_branches_is_not_split_and_says_so(name: str, workers: Workers) -> None:
    make, options = EVERY[name]
    pipe = make()
    with parallelize(pipe, workers, drafts=2):
        together = run(pipe, options)
    with parallelize(pipe, workers, drafts=2, split_guidance=True) as parallel:
        assert torch.equal(run(pipe, options), together)
    assert [note.partition(":")[0] for note in parallel.report.calls[0].notes] == ["guidance was not split"]


def test_a_batch_whose_halves_depend_on_each_other_is_not_split(workers: Workers) -> None:
    pipe = sdxl()
    pipe.unet.conv_out = MixingConv(pipe.unet.conv_out)
    with parallelize(pipe, workers, drafts=2):
        together = run(pipe, CHEAP)
    with parallelize(pipe, workers, drafts=2, split_guidance=True) as parallel:
        assert torch.equal(run(pipe, CHEAP), together)
    assert list(parallel.report.calls[0].notes) == [
        "guidance was not split: the halves of the batch depend on each other"
    ]


def test_guidance_may_end_on_the_way(workers: Workers) -> None:
    """The denoiser's batch is halved in the middle: the step is learned from anew, and drafts go on."""
    pipe = sdxl()

    def end_guidance(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if i != 3:
            return {}
        pipe._guidance_scale = 0.0
        return {name: value.chunk(2)[-1] for name, value in kept.items() if name != "latents"}

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    options = {**CHEAP, "callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": names}
    untouched = run(pipe, options, steps=10)
    with parallelize(pipe, workers, drafts=1) as parallel:
        assert torch.equal(run(pipe, options, steps=10), untouched)
    with reference(pipe, devices=3):
        expected = run(pipe, options, steps=10)
    with parallelize(pipe, workers) as parallel:
        assert torch.equal(run(pipe, options, steps=10), expected)
    (report,) = parallel.report.calls
    assert not report.sequential
    assert sum(report.notes.values()) == 1
    assert report.rounds < 10
