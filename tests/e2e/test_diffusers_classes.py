"""Each pipeline class with a small configuration: one draft is exact, and three save rounds or the report says why."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from bench.coverage import CASES, look_at
from bench.tables import PAGE

pytestmark = pytest.mark.filterwarnings("ignore")  # of all kinds, from diffusers' own pipelines

CHEAP = ("StableDiffusionXLAdapterPipeline", "ZImageInpaintPipeline", "LTXImageToVideoPipeline", "LuminaPipeline")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in CHEAP else pytest.mark.diffusers) for name in CASES]
)
def test_a_class_is_exact_and_drafted_or_says_why(name: str) -> None:
    row = look_at(name)
    assert row.exact
    assert row.rounds < row.steps or row.why
    assert str(row) in PAGE.read_text().splitlines(), "python -m bench.coverage --write updates the table"


def test_there_are_many_classes() -> None:
    assert len(CASES) >= 60
