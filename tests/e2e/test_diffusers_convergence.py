"""Schedulers that are sequential by default are those whose drafted samples do not approach the sequential ones."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from bench.convergence import converges, measure
from tests.tiny.schedulers import SCHEDULERS

pytestmark = pytest.mark.filterwarnings("ignore")  # torchsde, and numpy in diffusers' schedulers

CHEAP = ("DDIM", "DDIM, clip_sample", "DDPM, clip_sample", "LCM")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in CHEAP else pytest.mark.diffusers) for name in SCHEDULERS]
)
def test_what_does_not_converge_is_sequential(name: str) -> None:
    distances, reason = measure(name, (12, 24, 48) if name in CHEAP else (24, 48, 96))
    assert converges(distances) == (not reason)
