"""`drp sample --diffusers PATH --prompt ...`: a pipeline of diffusers in the place of a model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from drp.plain import check_writable, parse_numbers, plain_errors

KEPT = ("rows", "shape", "steps", "devices", "mode", "drafts", "rule", "tolerance", "warmup", "threads", "guidance")
"""Options of `drp sample` that a pipeline has too, beside --seed, --out and --trace."""


def pipeline_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let `drp sample` draw with a pipeline if it is given one."""

    @click.option(
        "--diffusers", metavar="PATH", help="Instead of MODEL a diffusers pipeline: a folder, or a hub's name."
    )
    @click.option("-p", "--prompt", help="What the pipeline is to draw.")
    @click.option("--negative-prompt", help="What it is not to draw.")
    @functools.wraps(command)
    def sample(diffusers: str | None, prompt: str | None, negative_prompt: str | None, **options: Any) -> None:
        with plain_errors():
            if diffusers is not None:
                source = click.get_current_context().get_parameter_source
                given = {name for name in options if source(name) is not ParameterSource.DEFAULT}
                _draw(diffusers, prompt, negative_prompt, options, given)
                return
            if prompt is not None or negative_prompt is not None:
                raise ValueError("a prompt goes with a pipeline; name one by --diffusers")
        command(**options)

    return sample


def _draw(path: str, prompt: str | None, negative: str | None, options: dict[str, Any], given: set[str]) -> None:
    """Draw with the pipeline at `path`; `given` are the options that the user gave."""
    lost = sorted(given - {*KEPT, "seed", "out", "trace"})
    if lost:
        raise ValueError(f"--{lost[0].replace('_', '-')} goes with drp's own models; a pipeline brings that along")
    if prompt is None:
        raise ValueError("prompt is missing; say by --prompt what the pipeline is to draw")
    out: Path = options["out"]
    check_writable(out)
    try:
        import torch
        from diffusers import DiffusionPipeline

        from drp.diffusers import parallelize
        from drp.pictures import save_grid
    except ImportError as error:
        raise ValueError(f"{error}; pip install 'draft-refine[diffusers]'") from None

    pipe = DiffusionPipeline.from_pretrained(path)
    arguments: dict[str, Any] = {"prompt": prompt, "output_type": "pt", "num_inference_steps": options["steps"]}
    arguments["generator"] = torch.Generator().manual_seed(options["seed"])
    arguments["num_images_per_prompt"] = options["rows"]
    if negative is not None:
        arguments["negative_prompt"] = negative
    if options["guidance"] is not None:
        arguments["guidance_scale"] = options["guidance"]
    if options["shape"] is not None:
        size = parse_numbers("shape", options["shape"])
        if len(size) != 2:
            raise ValueError(f"shape is {options['shape']!r}; a pipeline's is height and width, such as 512,768")
        arguments["height"], arguments["width"] = size
    taken = inspect.signature(pipe.__call__).parameters
    unknown = [name for name in arguments if name not in taken]
    if unknown:
        raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]}; call it from Python, with drp.diffusers")
    chosen = {name: options[name] for name in ("devices", "mode", "drafts", "rule", "tolerance", "warmup", "threads")}
    with parallelize(pipe, **chosen, trace=options["trace"]) as run:
        images = pipe(**arguments).images
    save_grid(images.float() * 2 - 1, 1, out, scale=1)
    click.echo(str(run.report))
    click.echo(f"wrote {out}")
