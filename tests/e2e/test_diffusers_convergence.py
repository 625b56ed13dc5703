"""Schedulers that are sequential by default are those whose drafted samples do not approach the sequential ones."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")


from bench.convergence import STEPS, converges, measure
from tests.tiny.schedulers import SCHEDULERS

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # torchsde, and numpy in diffusers' schedulers
    pytest.mark.timeout(600),  # some 1,000 evaluations each, on a machine that may be busy
]


CHEAP = ("DDIM, clip_sample",)
NAMES = [pytest.param(name, marks=[] if name in CHEAP else pytest.mark.diffusers) for name in SCHEDULERS]


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_converge_is_sequential(name: str) -> None:
    distances, reason = measure(name, STEPS[:2] if name in CHEAP else STEPS)
    assert converges(distances) == (not reason)
