"""Samples one image with SDXL on several devices.

    python examples/pipelines/sdxl.py "an astronaut on a horse" --devices 4xcuda
    python examples/pipelines/sdxl.py --tiny

`--tiny` uses small random weights and needs no download; the result is noise.
"""

import argparse

import torch
from diffusers import StableDiffusionXLPipeline

from drp.diffusers import parallelize

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="an astronaut on a horse")
    parser.add_argument("--devices", default="2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", default="sdxl.png")
    args = parser.parse_args()

    if args.tiny:
        import tiny

        pipe, size = tiny.sdxl(), {"height": 64, "width": 64, "original_size": (64, 64)}
    else:
        pipe, size = StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0"), {}

    if "cuda" in args.devices:
        pipe.to("cuda", torch.float16)

    with parallelize(pipe, devices=args.devices, mode="aggressive") as run:
        seed = torch.Generator().manual_seed(0)
        image = pipe(args.prompt, num_inference_steps=args.steps, generator=seed, **size).images[0]
    print(run.report)
    image.save(args.out)
