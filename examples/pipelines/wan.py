"""Samples one video with Wan on several devices. Each step has two calls of the transformer, both of which are drafted.

    python examples/pipelines/wan.py "a fox runs through snow" --devices 4xcuda
    python examples/pipelines/wan.py --tiny

`--tiny` uses small random weights and needs no download; the result is noise.
"""

import argparse

import torch
from diffusers import WanPipeline

from drp.diffusers import parallelize

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a fox runs through snow")
    parser.add_argument("--devices", default="2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", default="wan.gif")
    args = parser.parse_args()

    if args.tiny:
        import tiny

        pipe, size = tiny.wan(), {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 32}
    else:
        pipe, size = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"), {}

    if "cuda" in args.devices:
        pipe.to("cuda", torch.bfloat16)

    with parallelize(pipe, devices=args.devices, mode="aggressive") as run:
        seed = torch.Generator().manual_seed(0)
        frames = pipe(args.prompt, num_inference_steps=args.steps, generator=seed, output_type="pil", **size).frames[0]
    print(run.report)
    frames[0].save(args.out, save_all=True, append_images=frames[1:], duration=62)
