"""Pipelines of diffusers on one GPU: bits, memory, time and synchronizations, with networks of real sizes.

    python -m bench.gpu_pipelines [--tiny] [--devices 2xcuda:0] [--steps 24] [--only sd15] [--eager] [--compiled sd15]

Stable Diffusion 1.5, SDXL and Flux (fewer layers) with random weights in bfloat16 and real pipeline classes; text
embeddings are random, and latents are not decoded. Printed, each relative to the untouched pipeline: whether one draft
has its bits, whether the workers have the bits of `reference`, the memory that the workers add, and the time of a call:
with the workers, and with four drafts as one batch on one device, eager and, without `--eager`, captured as a CUDA
graph. Compiling takes minutes, and is done for one pipeline; `--compiled only` measures nothing else. `--tiny` does the
same with tiny networks on two cores, without graphs, to test this script where no GPU is. Rows are written to
bench/results/gpu-pipelines.json as they come. What fails is a row too, and the rest is measured; problems are repeated
at the end, and make the exit status 1.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from bench import figures
from bench.gpu import RESULTS, write
from drp import ExecutionOptions
from drp.diffusers import Workers, parallelize, reference
from drp.diffusers.pytree import flatten, rebuild
from drp.models.gpu import Graphs

NAMES = ("sd15", "sdxl", "flux")
GAIN = 1.5
"""What four drafts as a batch are to gain over the untouched pipeline, both captured."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BLOCKS = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
TINY_UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
}
TINY_XL = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 8}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64, "down_block_types": BLOCKS}
FLUX = {"num_layers": 4, "num_single_layers": 8, "guidance_embeds": True}
TINY_FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 4, 8),
    "in_channels": 16,
    "guidance_embeds": True,
}


@dataclass
class Setting:
    """Where the networks run: their dtype, whether they are tiny, the workers' devices, and what else is measured."""

    device: str
    dtype: torch.dtype
    tiny: bool
    devices: str
    steps: int
    graphs: bool
    compiled: bool
    only_compiled: bool = False
    turns: int = 3

    def made(self, kind: Any, options: dict[str, Any]) -> Any:
        """Return a network with random weights."""
        torch.manual_seed(0)
        with torch.device(self.device):
            return kind(**options).to(self.dtype).eval()

    def normal(self, *shape: int) -> Tensor:
        """Return random numbers, the same every time."""
        generator = torch.Generator().manual_seed(len(shape))
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)


def sd15(setting: Setting) -> tuple[Any, dict[str, Any]]:
    """Return Stable Diffusion 1.5 at 512 x 512, and the arguments of a call."""
    width, size = (8, 16) if setting.tiny else (768, 512)
    none = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(
        vae=_vae(setting),
        unet=setting.made(UNet2DConditionModel, TINY_UNET if setting.tiny else SD15),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1),
        requires_safety_checker=False,
        **none,
    )
    return pipe, _prompts(setting, 77, width) | {"height": size, "width": size}


def sdxl(setting: Setting) -> tuple[Any, dict[str, Any]]:
    """Return SDXL at 1024 x 1024, and the arguments of a call."""
    width, pooled, size = (8, 8, 16) if setting.tiny else (2048, 1280, 1024)
    none = {"text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    options = {**TINY_UNET, **TINY_XL} if setting.tiny else SDXL
    unet = {**options, "addition_embed_type": "text_time", "use_linear_projection": True}
    pipe = StableDiffusionXLPipeline(
        vae=_vae(setting),
        unet=setting.made(UNet2DConditionModel, unet),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1),
        **none,
    )
    names = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    more = {name: setting.normal(1, pooled) for name in names}
    return pipe, _prompts(setting, 77, width) | more | {"height": size, "width": size}


def flux(setting: Setting) -> tuple[Any, dict[str, Any]]:
    """Return a part of Flux at 1024 x 1024, and the arguments of a call."""
    width, pooled, size = (8, 8, 16) if setting.tiny else (4096, 768, 1024)
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipe = FluxPipeline(
        vae=_vae(setting),
        transformer=setting.made(FluxTransformer2DModel, TINY_FLUX if setting.tiny else FLUX),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        **dict.fromkeys(names),
    )
    embeds = {"prompt_embeds": setting.normal(1, 64, width), "pooled_prompt_embeds": setting.normal(1, pooled)}
    return pipe, embeds | {"height": size, "width": size}


def _vae(setting: Setting) -> Any:
    """Return a tiny autoencoder that makes latents an eighth of the image's size, or half of it if all is tiny."""
    blocks = 2 if setting.tiny else 4
    return setting.made(
        AutoencoderKL,
        {
            "block_out_channels": (8,) * blocks,
            "norm_num_groups": 4,
            "down_block_types": ("DownEncoderBlock2D",) * blocks,
            "up_block_types": ("UpDecoderBlock2D",) * blocks,
            "latent_channels": 4,
        },
    )


def _prompts(setting: Setting, tokens: int, width: int) -> dict[str, Any]:
    return {name: setting.normal(1, tokens, width) for name in ("prompt_embeds", "negative_prompt_embeds")}


def call(pipe: Any, options: dict[str, Any], setting: Setting) -> Tensor:
    """Return the latents of a call."""
    generator = torch.Generator().manual_seed(0)
    result = pipe(**options, num_inference_steps=setting.steps, generator=generator, output_type="latent").images
    return torch.as_tensor(result).clone()


def seconds(pipe: Any, options: dict[str, Any], setting: Setting) -> float:
    """Return the shortest time of a call, after one that does not count."""
    best = float("inf")
    for turn in range(setting.turns + 1):
        _synchronize()
        began = time.perf_counter()
        call(pipe, options, setting)
        _synchronize()
        best = min(best, time.perf_counter() - began) if turn else best
    return best


def synchronizations(what: Callable[[], Tensor]) -> str:
    """Return how often this process waited for its GPU in a call, by the names of CUDA's functions."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(torch.profiler.ProfilerActivity.CUDA)  # It records the calls of CUDA's runtime, too.
    with torch.profiler.profile(activities=kinds) as profile:
        what()
    names = Counter(event.name for event in profile.events() or () if "Synchronize" in event.name)
    return ", ".join(f"{name} {count}" for name, count in sorted(names.items())) or "none"


Rows = Iterator[tuple[str, str]]


def measure(make: Callable[[Setting], tuple[Any, dict[str, Any]]], setting: Setting) -> Rows:
    """Yield what was found of one pipeline, as names and values. What fails does not keep the rest from being tried."""
    pipe, options = make(setting)
    pipe.set_progress_bar_config(disable=True)
    yield "weights of the denoiser, MB", f"{sum(p.nbytes for p in denoiser(pipe).parameters()) / 1e6:.0f}"
    parts = {
        "several workers": not setting.only_compiled and measure_workers(pipe, options, setting),
        "a batch": not setting.only_compiled and measure_batch(pipe, options, setting),
        "graphs": setting.graphs and not setting.only_compiled and measure_graphs(pipe, options, setting),
        "compiling": setting.compiled and measure_compiled(pipe, options, setting),
    }
    for name, rows in parts.items():
        try:
            yield from rows or ()
        except Exception as error:
            traceback.print_exc()
            yield f"{name}: FAILED", f"{type(error).__name__}: {error}"


def problems(rows: Mapping[str, str]) -> list[str]:
    """Return the rows that say that something is wrong: no figures, whose size is judged by the reader."""
    fine = {"bits": "True", "FAILED": "", "sequential because": "it was not", ": batched": "yes"}
    return [
        f"{name}: {value}"
        for name, value in rows.items()
        for what, due in fine.items()
        if what in name and value != due
    ]


def measure_workers(pipe: Any, options: dict[str, Any], setting: Setting) -> Rows:
    """Yield what several workers make of it, relative to the untouched pipeline."""
    untouched = call(pipe, options, setting)
    plain = seconds(pipe, options, setting)
    yield "untouched, s", f"{plain:.3f}"
    with reference(pipe, devices=setting.devices, mode="aggressive"):
        expected = call(pipe, options, setting)
    before = _used()
    with Workers(setting.devices, threads=1) as workers:
        with parallelize(pipe, workers, "aggressive") as run:
            same = torch.equal(call(pipe, options, setting), expected)
            yield "the bits of reference", str(same)
            yield "GPU memory of the workers, MB", f"{(_used() - before) / 1e6:.0f}"
            took = seconds(pipe, options, setting)
            yield "parallelized, s", f"{took:.3f} ({plain / took:.2f} times as fast)"
            yield "rounds", f"{run.report.calls[-1].rounds} of {run.report.calls[-1].steps} steps"
            yield "waits of this process in a call", synchronizations(lambda: call(pipe, options, setting))
            yield "sequential because", run.report.calls[-1].sequential or "it was not"
        with parallelize(pipe, workers, drafts=1):
            yield "one draft, the untouched bits", str(torch.equal(call(pipe, options, setting), untouched))


def measure_batch(
    pipe: Any, options: dict[str, Any], setting: Setting, execution: ExecutionOptions | None = None
) -> Rows:
    """Yield what one device makes of four drafts as a batch, relative to the untouched pipeline, captured alike."""
    how = "four drafts as a batch" + (", as a graph" if execution else "")
    with as_graphs(denoiser(pipe)) if execution else nullcontext():
        plain = seconds(pipe, options, setting)
    device = _first(setting.devices)
    with reference(pipe, devices=device, mode="aggressive", drafts_per_device=4):
        expected = call(pipe, options, setting)
    with parallelize(pipe, device, "aggressive", threads=1, drafts_per_device=4, execution=execution) as run:
        yield f"{how}, the bits", str(torch.equal(call(pipe, options, setting), expected))
        took = seconds(pipe, options, setting)
        yield f"{how}, s", f"{took:.3f} ({plain / took:.2f} times as fast)"
        report = run.report.calls[-1]
        serial = [note for note in report.notes if note.startswith("drafts of a device")]
        yield f"{how}: batched", report.sequential or "; ".join(serial) or "yes"
    if execution:
        yield "untouched, as a graph, s", f"{plain:.3f}"
        yield f"the goal, {GAIN} times as fast", "met" if plain / took >= GAIN else "MISSED"


def measure_graphs(pipe: Any, options: dict[str, Any], setting: Setting) -> Rows:
    """Yield the same as CUDA graphs."""
    return measure_batch(pipe, options, setting, ExecutionOptions(graphs=True))


def measure_compiled(pipe: Any, options: dict[str, Any], setting: Setting) -> Rows:
    """Yield the times of the compiled pipeline, untouched and with several workers, which compile too."""
    began = time.perf_counter()
    denoiser(pipe).compile()
    plain = seconds(pipe, options, setting)
    yield "untouched, compiled, s", f"{plain:.3f}, after {time.perf_counter() - began:.0f} s"
    with parallelize(pipe, setting.devices, "aggressive", threads=1) as run:
        began = time.perf_counter()
        took = seconds(pipe, options, setting)
        yield "compiled, s", f"{took:.3f} ({plain / took:.2f} times as fast), after {time.perf_counter() - began:.0f} s"
        yield "compiled, sequential because", run.report.calls[-1].sequential or "it was not"


def denoiser(pipe: Any) -> Any:
    """Return the module that a pipeline's steps call."""
    return getattr(pipe, "unet", None) or pipe.transformer


@contextmanager
def as_graphs(module: Any) -> Iterator[None]:
    """Have the untouched pipeline replay its denoiser as a CUDA graph, as workers do."""
    graphs, forward = Graphs(), module.forward

    def replay(*args: Any, **kwargs: Any) -> Any:
        arguments, tensors, _ = flatten((list(args), kwargs))

        def evaluate(given: dict[str, Tensor]) -> Any:
            args, kwargs = rebuild(arguments, list(given.values()))
            return forward(*args, **kwargs)

        given = {str(place): tensor for place, tensor in enumerate(tensors)}
        result, made, _ = flatten(graphs(evaluate, given, lambda: None, repr(arguments)))
        return rebuild(result, [tensor.clone() for tensor in made])

    module.forward = replay
    try:
        yield
    finally:
        del module.forward


def _first(devices: str) -> str:
    """Return the first of the workers' devices, with its number."""
    name = re.sub(r"^\d+x", "", devices.split(",")[0])
    return name if ":" in name else f"{name}:0"


def _used() -> int:
    """Return the bytes of the GPU that all processes use."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()  # What is kept for later is not needed.
    free, total = torch.cuda.mem_get_info()
    return total - free


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    """Measure all pipelines, and print a table of each and the problems; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny networks on cores")
    parser.add_argument("--devices", help="the workers' devices (default: 2xcuda:0); the pipeline is on the first")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--turns", type=int, default=3, help="calls of which the shortest counts")
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument(
        "--compiled", choices=[*NAMES, "only", "none"], default="sd15", help="which is measured compiled, too"
    )
    parser.add_argument("-o", "--out", type=Path, default=RESULTS / "gpu-pipelines.json")
    given = parser.parse_args(arguments)
    devices = given.devices or ("2xcpu" if given.tiny else "2xcuda:0")
    device, dtype = ("cpu", torch.float32) if given.tiny else (_first(devices), torch.bfloat16)
    if given.tiny:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)  # whose memory is measured
    began = time.perf_counter()
    found: dict[str, Any] = {"machine": figures.machine(), "devices": devices, "steps": given.steps, "tiny": given.tiny}
    print(found["machine"])
    graphs, only = not (given.tiny or given.eager), given.compiled == "only"
    wrong = []
    for make in (sd15, sdxl, flux):
        if given.only in (None, make.__name__):
            compiled = only or given.compiled == make.__name__
            setting = Setting(device, dtype, given.tiny, devices, given.steps, graphs, compiled, only, given.turns)
            print(f"\n{make.__name__}, {setting.steps} steps on {devices}")
            rows = found[make.__name__] = dict[str, str]()
            for name, value in measure(make, setting):
                print(f"  {name:46}{value}", flush=True)
                rows[name] = value
                write(given.out, found)
            print(f"  {time.perf_counter() - began:.0f} s since the beginning")
            wrong += [f"{make.__name__}: {problem}" for problem in problems(rows)]
            if not given.tiny:
                torch.cuda.empty_cache()
    for problem in wrong:
        print(f"PROBLEM: {problem}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
