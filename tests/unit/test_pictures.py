"""Pictures of samples, wherever these are."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image

from drp.cli.output import write_samples
from drp.pictures import encode_grid


class OnGpu(torch.Tensor):
    """A tensor that numpy cannot read directly, as a tensor on a GPU."""

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


@pytest.mark.parametrize("name", ["samples.png", "samples.npy", "samples.safetensors"])
def test_samples_on_a_gpu_are_written(name: str, tmp_path: Path) -> None:
    samples = torch.linspace(-1, 1, 48).view(1, 3, 4, 4)
    write_samples(samples, 1, tmp_path / f"expected {name}")
    write_samples(samples.as_subclass(OnGpu), 1, tmp_path / name)
    assert (tmp_path / name).read_bytes() == (tmp_path / f"expected {name}").read_bytes()


def test_arrays_and_tensors_have_the_same_picture() -> None:
    samples = torch.linspace(-1, 1, 32).view(2, 1, 4, 4)
    png = encode_grid(samples, 2, 1, 0)
    assert encode_grid(samples.numpy().astype(np.float64), 2, 1, 0) == png
    with Image.open(io.BytesIO(png)) as image:
        assert (image.size, image.getpixel((0, 0)), image.getpixel((7, 3))) == ((8, 4), 0, 255)
