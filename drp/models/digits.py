"""`digits`: handwritten digits, 28 x 28, by class, with classifier-free guidance. See digits.md, the model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from drp.models.registry import BUILT_IN
from drp.models.unet import UNet

WEIGHTS = Path(__file__).with_name("digits.safetensors")


class Digits(nn.Module):
    """The U-Net with classifier-free guidance (Ho and Salimans 2022); both branches are evaluated as one batch."""

    spec = BUILT_IN["digits"][1]

    def __init__(self) -> None:
        super().__init__()
        assert self.spec.classes is not None
        self.unet = UNet(classes=self.spec.classes)

    def forward(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the guided noise for x [B, 1, 28, 28]; `cond` holds labels int64 [B] and guidance, a number."""
        labels, guidance = cond["labels"], cond["guidance"]
        if guidance == 1:
            bare: Tensor = self.unet(x, t, labels)
            return bare
        nothing = torch.full_like(labels, self.unet.label.num_embeddings - 1)
        both = self.unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, nothing]))
        with_class, without = both.chunk(2)
        guided: Tensor = without + guidance * (with_class - without)
        return guided


def load() -> Digits:
    """Return the trained model."""
    model = Digits()
    model.unet.load_state_dict(load_file(WEIGHTS))
    return model
