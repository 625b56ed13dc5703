"""Each pipeline class with a small configuration: one draft is exact, and three save rounds or the report says why."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("diffusers")

import torch

from bench.coverage import CASES, look_at

pytestmark = pytest.mark.filterwarnings("ignore")  # of all kinds, from diffusers' own pipelines

CHEAP = ("StableDiffusionXLAdapterPipeline", "ZImageInpaintPipeline", "LTXImageToVideoPipeline", "LuminaPipeline")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in CHEAP else pytest.mark.diffusers) for name in CASES]
)
def test_a_class_is_exact_and_drafted_or_says_why(name: str) -> None:
    row = look_at(name)
    assert row.exact
    assert row.rounds < row.steps or row.why


def test_there_are_many_classes() -> None:
    assert len(CASES) >= 60
