"""Samples two images with Stable Diffusion 3 on several devices; both calls use the same workers.

    python examples/pipelines/sd3.py "an astronaut on a horse" --devices 4xcuda
    python examples/pipelines/sd3.py --tiny

`--tiny` uses small random weights and needs no download; the result is noise.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline

from drp.diffusers import parallelize

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="an astronaut on a horse")
    parser.add_argument("--devices", default="2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", default="sd3.png")
    args = parser.parse_args()

    if args.tiny:
        import tiny

        pipe, size = tiny.sd3(), {"max_sequence_length": 32, "height": 64, "width": 64}
    else:
        pipe, size = StableDiffusion3Pipeline.from_pretrained("stabilityai/stable-diffusion-3-medium-diffusers"), {}

    if "cuda" in args.devices:
        pipe.to("cuda", torch.float16)

    with parallelize(pipe, devices=args.devices, mode="aggressive") as run:
        seed = torch.Generator().manual_seed(0)
        size |= {"num_inference_steps": args.steps, "generator": seed}
        image = pipe(args.prompt, **size).images[0]
        other = pipe(args.prompt, negative_prompt="rain", **size).images[0]
    print(run.report)
    image.save(args.out)
    other.save(Path(args.out).with_stem(f"{Path(args.out).stem}-dry"))
