"""Samples one image with Flux on several devices, with a callback at every step.

    python examples/pipelines/flux.py "an astronaut on a horse" --devices 4xcuda
    python examples/pipelines/flux.py --tiny

`--tiny` uses small random weights and needs no download; the result is noise.
"""

import argparse

import torch
from diffusers import FluxPipeline

from drp.diffusers import parallelize


def print_norm(
    pipe: FluxPipeline, step: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Print the norm of the latents."""
    print(f"step {step}: latents of norm {float(tensors['latents'].float().norm()):.1f}")
    return {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="an astronaut on a horse")
    parser.add_argument("--devices", default="2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", default="flux.png")
    args = parser.parse_args()

    if args.tiny:
        import tiny

        pipe, size = tiny.flux(), {"height": 64, "width": 64, "max_sequence_length": 32}
    else:
        pipe, size = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev"), {}

    if "cuda" in args.devices:
        pipe.to("cuda", torch.bfloat16)

    with parallelize(pipe, devices=args.devices, mode="aggressive") as run:
        seed = torch.Generator().manual_seed(0)
        size |= {"num_inference_steps": args.steps, "generator": seed, "callback_on_step_end": print_norm}
        image = pipe(args.prompt, **size).images[0]
    print(run.report)
    image.save(args.out)
