"""Samples are what they were: bit for bit on the machine that drew the golden ones, elsewhere to rounding."""

from __future__ import annotations

import pytest
import torch

from tests.golden.samples import cases, draw, load, machine

GOLDEN, DRAWN_ON = load()


def test_every_case_is_stored_and_no_other() -> None:
    assert set(GOLDEN) == set(cases())


@pytest.mark.parametrize("name", cases())
def test_samples_are_the_golden_ones(name: str) -> None:
    samples = draw(cases()[name])
    if machine() == DRAWN_ON:
        assert torch.equal(samples, GOLDEN[name])
    else:  # another processor may add up in another order
        torch.testing.assert_close(samples, GOLDEN[name], rtol=1e-4, atol=1e-5)
