"""A run may start from an image on a GPU. No GPU is needed: the image refuses arithmetic with tensors of the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drp.leader.job import make_job
from drp.leader.request import Request
from drp.models import ModelSpec


class OnGpu(Tensor):
    """A tensor that only `to(tensor)` takes to the host."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and isinstance(args[1], Tensor):
            return args[0].as_subclass(Tensor)
        if func is Tensor.mul:
            raise RuntimeError("Expected all tensors to be on the same device")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch's own


def start(image: Tensor) -> Tensor:
    request = Request(count=2, image=image, strength=0.25, steps=20)
    return make_job(request, ModelSpec(sample_shape=(2, 3)), 1).start


def test_an_image_may_lie_on_a_gpu_and_record_gradients() -> None:
    image = torch.linspace(-1, 1, 12).view(2, 2, 3)
    begun = start(image.as_subclass(OnGpu))
    assert type(begun) is Tensor
    assert torch.equal(begun, start(image))
    assert not start(image.clone().requires_grad_()).requires_grad
