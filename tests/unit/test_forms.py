"""How an argument of a denoiser follows from the latents."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from drp.diffusers.forms import OfState, Point, of_state


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 8, 8), (320,), (1,)])
def test_a_tensor_on_another_device_is_not_compared_with_the_latents(shape: tuple[int, ...]) -> None:
    """A pipeline on a GPU may have arguments that stay on the host. Here the other device is the meta device."""
    point = Point(torch.linspace(-1, 1, 256).view(1, 4, 8, 8), lambda x: x, {})
    assert of_state(torch.empty(shape, device="meta"), point, {}) is None
    assert of_state(point.x.clone(), point, {}) == OfState()
