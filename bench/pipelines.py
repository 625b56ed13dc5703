"""Pipelines of diffusers, measured on this machine's cores: a small SDXL, and ParaDiGMS beside ours.

    python -m bench.pipelines [--short]

Everything in a table has the same cores. Ours has a worker with one thread on each; the others one process with as many
threads. Times are the best of some turns, taken in turn.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.deprecated.stable_diffusion_variants.pipeline_stable_diffusion_paradigms import (
    StableDiffusionParadigmsPipeline,
)
from torch import Tensor

from bench import sd_digits
from drp.diffusers import Workers, parallelize
from drp.torch_threads import torch_threads

TINY = Path(__file__).parent.parent / "examples" / "pipelines"


@dataclass
class Way:
    """A way to sample; `rounds` are evaluations that followed one another, `evaluations` all of them."""

    name: str
    sample: Callable[[], tuple[Tensor, int, int]]
    seconds: list[float] = field(default_factory=list)
    samples: Tensor | None = None
    rounds: int = 0
    evaluations: int = 0


def measure(ways: list[Way], turns: int) -> None:
    """Sample in every way, in turn, after a turn that does not count."""
    for turn in range(turns + 1):
        for way in ways:
            began = time.perf_counter()
            way.samples, way.rounds, way.evaluations = way.sample()
            if turn:
                way.seconds.append(time.perf_counter() - began)


def table(ways: list[Way]) -> Iterator[str]:
    """Yield the rows, everything relative to the first way."""
    first = ways[0]
    assert first.samples is not None
    yield "| way | rounds | evaluations | seconds | speed-up | distance from sequential, relative L2, mean |"
    yield "|---|---|---|---|---|---|"
    for way in ways:
        assert way.samples is not None
        apart = (way.samples - first.samples).flatten(1).norm(dim=1) / first.samples.flatten(1).norm(dim=1)
        gain = min(first.seconds) / min(way.seconds)
        yield (
            f"| {way.name} | {way.rounds} | {way.evaluations} | {min(way.seconds):.2f} | {gain:.2f} "
            f"| {float(apart.mean()):.4f} |"
        )


def untouched(pipe: Any, options: dict[str, Any], cores: int) -> Way:
    """Return the pipeline as it is, with all cores."""

    def sample() -> tuple[Tensor, int, int]:
        with torch_threads(cores):
            images = pipe(**options, generator=torch.Generator().manual_seed(0)).images
        return images, len(pipe.scheduler.timesteps), len(pipe.scheduler.timesteps)

    return Way(f"sequential, {cores} threads", sample)


def ours(pipe: Any, options: dict[str, Any], workers: Workers, mode: str, drafts: int) -> Way:
    """Return the pipeline on workers, each with a core."""

    def sample() -> tuple[Tensor, int, int]:
        with torch_threads(1), parallelize(pipe, workers, mode, drafts=drafts) as run:
            images = pipe(**options, generator=torch.Generator().manual_seed(0)).images
        (report,) = run.report.calls
        if report.sequential:
            raise RuntimeError(f"there were no drafts: {report.sequential}")
        return images, report.rounds, report.evaluations

    return Way(f"{mode}, {drafts} drafts per round, {len(workers.devices)} workers", sample)


def paradigms(pipe: Any, options: dict[str, Any], cores: int, window: int, tolerance: float) -> Way:
    """Return diffusers' ParaDiGMS, its window one batch in this process, with all cores."""

    def sample() -> tuple[Tensor, int, int]:
        sizes: list[int] = []
        hook = pipe.unet.register_forward_pre_hook(
            lambda module, args: sizes.append(len(args[0]) // (2 * len(options["latents"])))
        )
        try:
            with torch_threads(cores):
                images = pipe(
                    **options, parallel=window, tolerance=tolerance, generator=torch.Generator().manual_seed(0)
                ).images
        finally:
            hook.remove()
        return images, len(sizes), sum(sizes)

    return Way(f"ParaDiGMS, window {window}, tolerance {tolerance:g}, {cores} threads", sample)


def beside_paradigms(workers: Workers, cores: int, count: int, steps: int, turns: int) -> Iterator[str]:
    """Yield a table of ParaDiGMS and ours: the trained digits model in diffusers' own pipelines."""
    options = sd_digits.arguments(torch.arange(count) % 10, steps)
    pipe, other = sd_digits.pipeline(), sd_digits.pipeline(StableDiffusionParadigmsPipeline)
    other.wrapped_unet = other.unet
    ways = [
        untouched(pipe, options, cores),
        *(ours(pipe, options, workers, mode, n) for n in (2, 4) for mode in ("conservative", "aggressive")),
        *(paradigms(other, options, cores, window, tolerance) for window in (2, 4, 16) for tolerance in (0.1, 0.01)),
    ]
    measure(ways, turns)
    yield f"### {count} digits, {steps} steps of DDIM, guidance 2"
    yield from table(ways)


def small_sdxl(workers: Workers, cores: int, steps: int, turns: int) -> Iterator[str]:
    """Yield a table of SDXL with a small random U-Net."""
    sys.path.insert(0, str(TINY))
    tiny: Any = __import__("tiny")
    pipe = tiny.sdxl()
    pipe.set_progress_bar_config(disable=True)
    embeddings = pipe.encode_prompt("an astronaut", device="cpu")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    size = {"height": 128, "width": 128, "num_inference_steps": steps, "output_type": "latent"}
    options = {**dict(zip(names, embeddings, strict=True)), **size}
    drafts = len(workers.devices)
    ways = [
        untouched(pipe, options, cores),
        untouched(pipe, options, 1),
        *(ours(pipe, options, workers, mode, drafts) for mode in ("conservative", "aggressive")),
    ]
    measure(ways, turns)
    millions = sum(p.numel() for p in pipe.unet.parameters()) / 1e6
    yield f"### SDXL with {millions:.1f} million random weights, latents 64 x 64, {steps} steps of Euler"
    yield from table(ways)


def main() -> None:
    """Measure and print, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few steps and one turn: to see that it works")
    short = parser.parse_args().short
    cores, turns = len(os.sched_getaffinity(0)), 1 if short else 3
    print(f"{platform.processor() or platform.machine()}, {cores} cores, torch {torch.__version__}")
    with Workers(cores, threads=1) as workers:
        for lines in (
            small_sdxl(workers, cores, 6 if short else 30, turns),
            beside_paradigms(workers, cores, 2 if short else 10, 8 if short else 48, turns),
        ):
            print("\n" + "\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
