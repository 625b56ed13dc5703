"""Train the `digits` denoiser.

    python -m training.train_digits --data ../shared/data/digits.npz

About 45 minutes on 2 cores. The loss is the mean squared error of the predicted noise; the weights kept are a
moving average. The last 1,000 images of the file are never trained on.

With `--predicts v` or `flow`, and a file of its own, it trains networks of these kinds for `bench.other_networks`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from drp.models.unet import UNet
from drp.sampling.schedules import TRAINING_STEPS, scaled_linear_alpha_bars

HELD_OUT = 1000
CLASSES = 10
PEAK_RATE = 2e-3
WARMUP = 200


def load_images(path: Path) -> tuple[Tensor, Tensor]:
    """Return all images, float32 [n, 1, 28, 28] in [-1, 1], and their labels, int64 [n]."""
    with np.load(path) as data:
        images = torch.from_numpy(data["images"]).float()[:, None] / 127.5 - 1.0
        return images, torch.from_numpy(data["labels"]).long()


def learning_rate(step: int, steps: int) -> float:
    """Warm up linearly, then fall to zero along a half cosine."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP)))


def loss_of(
    model: torch.nn.Module, predicts: str, images: Tensor, labels: Tensor, alpha_bars: Tensor, g: torch.Generator
) -> Tensor:
    """Return the mean squared error of what is predicted at random timesteps, labels as given.

    Where the network predicts the velocity of flow matching, alpha = 1 - sigma and the timestep is 1,000 sigma.
    """
    if predicts == "flow":
        t = TRAINING_STEPS * (1 - torch.rand(len(images), generator=g))
        sigma = t / TRAINING_STEPS
        alpha = 1 - sigma
    else:
        t = torch.randint(TRAINING_STEPS, (len(images),), generator=g)
        alpha, sigma = alpha_bars[t].sqrt(), (1 - alpha_bars[t]).sqrt()
    alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
    noise = torch.randn(images.shape, generator=g)
    wanted = {"epsilon": noise, "v": alpha * noise - sigma * images, "flow": noise - images}[predicts]
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(alpha * images + sigma * noise, t, labels)
    return F.mse_loss(predicted.float(), wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("drp/models/digits.safetensors"))
    parser.add_argument("--predicts", choices=["epsilon", "v", "flow"], default="epsilon")
    parser.add_argument("--channels", type=int, nargs=3, default=[32, 64, 96], help="of the three levels")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--drop-label", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    g = torch.Generator().manual_seed(args.seed)
    images, labels = load_images(args.data)
    train_images, train_labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    alpha_bars = torch.from_numpy(scaled_linear_alpha_bars()).float()

    model = UNet(tuple(args.channels), CLASSES)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def save(step: int, loss: float) -> None:
        average.eval()
        with torch.no_grad():
            # The same noise every time, so that the figures of two checkpoints compare.
            fixed = torch.Generator().manual_seed(1)
            held_out = loss_of(average, args.predicts, images[-HELD_OUT:], labels[-HELD_OUT:], alpha_bars, fixed).item()
        recipe = {"steps": step, "batch": args.batch, "drop_label": args.drop_label, "seed": args.seed}
        kind = {"predicts": args.predicts, "channels": json.dumps(args.channels)}
        facts = {**kind, "recipe": json.dumps(recipe), "loss": f"{loss:.5f}", "held_out_loss": f"{held_out:.5f}"}
        save_file(average.module.state_dict(), args.out, metadata=facts)
        seconds = time.monotonic() - began
        print(f"step {step}: loss {loss:.5f}, held-out loss {held_out:.5f}, {seconds:.0f} s", flush=True)

    began = time.monotonic()
    recent = 0.0
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps)
        picked = torch.randint(len(train_images), (args.batch,), generator=g)
        dropped = torch.rand(args.batch, generator=g) < args.drop_label
        shown = torch.where(dropped, CLASSES, train_labels[picked])
        loss = loss_of(model, args.predicts, train_images[picked], shown, alpha_bars, g)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        recent = loss.item() if step == 0 else 0.99 * recent + 0.01 * loss.item()
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            save(step + 1, recent)


if __name__ == "__main__":
    main()
