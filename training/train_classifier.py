"""Train the classifier that judges digits.

    python -m training.train_classifier --data ../shared/data/digits.npz

About two minutes. The last 1,000 images of the file are held out; the accuracy printed, and kept in
the file, is theirs.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from training.classifier import Classifier
from training.train_digits import HELD_OUT, load_images

EPOCHS = 30
BATCH = 100


def jitter(images: Tensor) -> Tensor:
    """Turn, scale and shift each image a little: up to 12 degrees, 12 %, 2 pixels."""
    n = len(images)
    turn, zoom = (torch.rand(2, n) - 0.5) * torch.tensor([[0.42], [0.24]])
    shift = (torch.rand(n, 2, 1) - 0.5) * 4 / 14
    rotation = torch.stack([turn.cos(), -turn.sin(), turn.sin(), turn.cos()], dim=1).view(n, 2, 2)
    affine = torch.cat([rotation * (1 + zoom)[:, None, None], shift], dim=2)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    # The background is -1; outside of the picture there is background too.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def accuracy(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images read right."""
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("training/classifier.safetensors"))
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = load_images(args.data)
    train, truth = images[:-HELD_OUT], labels[:-HELD_OUT]
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for epoch in range(EPOCHS):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * 0.5 * (1 + math.cos(math.pi * epoch / EPOCHS))
        for picked in torch.split(torch.randperm(len(train)), BATCH):
            loss = F.cross_entropy(model(jitter(train[picked])), truth[picked])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
            optimizer.step()
        held_out = accuracy(model, images[-HELD_OUT:], labels[-HELD_OUT:])
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, held-out accuracy {held_out:.4f}", flush=True)
    # The last epoch's weights, whatever their accuracy: picking the best epoch by the held-out images would flatter it.
    save_file(model.state_dict(), args.out, metadata={"held_out_accuracy": f"{held_out:.4f}"})


if __name__ == "__main__":
    main()
