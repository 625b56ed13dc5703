"""Pipelines on workers of other machines, here processes that dial in: they load the denoiser themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from drp import RemoteWorkers, WorkerError
from drp.diffusers import Workers, parallelize, reference
from drp.protocol.keys import make
from tests.pipelines import PIPELINES, run
from tests.remote import ending, free_address, start_worker

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning"),  # torch.compile's own
    pytest.mark.timeout(170),
]

_, OPTIONS = PIPELINES["SDXL"]
FACTORY = "tests.tiny.builders:sdxl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL, as `save_pretrained` leaves it."""
    made = tmp_path_factory.mktemp("sdxl")
    PIPELINES["SDXL"][0]().save_pretrained(made)
    return made


def load(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline.from_pretrained(folder, **none)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """One worker on this machine, which shares the weights, and one that dials in."""
    keys, address = tmp_path_factory.mktemp("keys"), free_address()
    make(keys, [], ["anna"])
    process = start_worker(address, keys, "anna")
    with ending([process]), Workers(["cpu:0", RemoteWorkers(1, address, keys)], threads=1) as made:
        yield made


def test_a_pipeline_has_the_same_bits_on_workers_that_have_loaded_it_themselves(folder: Path, workers: Workers) -> None:
    pipe = load(folder)
    with reference(pipe, devices=2, threads=1):
        expected = run(pipe, OPTIONS, steps=12)
    with parallelize(pipe, workers) as parallel:
        for _ in range(2):
            assert torch.equal(run(pipe, OPTIONS, steps=12), expected)
    for call in parallel.report.calls:
        assert not call.sequential
        assert not call.notes
        assert call.rounds < call.steps
    with parallelize(pipe, workers, pretrained={"revision": "main"}):
        assert torch.equal(run(pipe, OPTIONS, steps=12), expected)


def test_a_factory_loads_what_was_changed(workers: Workers) -> None:
    pipe = PIPELINES["SDXL"][0]()
    with reference(pipe, devices=2, threads=1):
        expected = run(pipe, OPTIONS)
    with parallelize(pipe, workers, pretrained=FACTORY) as parallel:
        assert torch.equal(run(pipe, OPTIONS), expected)
    assert not parallel.report.calls[0].sequential


def test_what_was_changed_after_loading_is_refused_with_both_digests_and_the_remedy(
    folder: Path, workers: Workers
) -> None:
    pipe = load(folder)
    pipe.unet.conv_out.weight.data.mul_(1.5)
    words = (
        r"worker \d .* unet as loaded here from .* has other weights than the leader's: the digests are [0-9a-f]{32} "
    )
    with (
        pytest.raises(WorkerError, match=rf"{words}and [0-9a-f]{{32}}; (.|\n)*pretrained='package.module:factory'"),
        parallelize(pipe, workers),
    ):
        pass
    pipe = load(folder)
    pipe.unet.set_default_attn_processor()
    pipe.unet.time_embedding.act = torch.nn.GELU()
    words = r"unet as loaded here from .* has other structure than the leader's"
    with pytest.raises(WorkerError, match=words), parallelize(pipe, workers):
        pass


def test_a_change_between_two_calls_makes_the_second_sequential_and_says_why(folder: Path, workers: Workers) -> None:
    pipe = load(folder)
    with parallelize(pipe, workers) as parallel:
        run(pipe, OPTIONS)
        pipe.unet.conv_out.weight.data.mul_(1.5)
        changed = run(pipe, OPTIONS)
    first, second = parallel.report.calls
    assert not first.sequential
    assert "unet as loaded here from" in second.sequential
    assert torch.equal(run(pipe, OPTIONS), changed)


def test_what_cannot_be_is_refused_before_any_work(folder: Path, workers: Workers) -> None:
    pipe = PIPELINES["SDXL"][0]()
    for pretrained, words in (
        (None, "StableDiffusionXLPipeline does not say what it was loaded from"),
        ("tests.nowhere:make", "pretrained is 'tests.nowhere:make', which cannot be imported: No module named"),
        ({"pretrained_model_name_or_path": folder, "device_map": object()}, "pretrained.device_map is a object, which"),
    ):
        with pytest.raises(ValueError, match=words), parallelize(pipe, workers, pretrained=pretrained):
            pass
    pipe = load(folder)
    pipe.unet.compile()
    words = "unet is compiled, which workers on other machines do not do"
    with pytest.raises(ValueError, match=words), parallelize(pipe, workers):
        pass
