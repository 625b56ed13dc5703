"""What a worker notices of modules that an evaluation has changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from drp.diffusers.features import add_cast
from drp.diffusers.worker import ChangeDetector


class Layer(nn.Linear):
    count = 0


def test_a_change_is_noticed_unless_it_was_expected() -> None:
    layer = Layer(2, 2)
    changes = ChangeDetector({"unet": layer})
    changes.check()
    changes.check()
    layer.count = 1
    changes.restart()
    changes.check()
    layer.count = 2
    with pytest.raises(RuntimeError, match="unet itself was changed by an evaluation"):
        changes.check()


def test_modules_whose_weights_each_evaluation_moves_are_left_out() -> None:
    layer = Layer(2, 2)
    add_cast(layer, torch.float8_e4m3fn, torch.float32)
    changes = ChangeDetector({"unet": layer})
    changes.check()
    layer(torch.ones(1, 2))
    layer.count = 1
    changes.check()
