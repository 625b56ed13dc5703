"""`drp sample --diffusers PATH --prompt ...`: sampling from a diffusers pipeline."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from drp.cli.helpers import parse_numbers, plain_errors, print_json
from drp.cli.leader_options import ray_devices
from drp.cli.options import pipeline_devices
from drp.cli.output import check_file, check_output, write_samples
from drp.pipelines import KINDS, load_pipeline

if TYPE_CHECKING:
    from drp.leader.devices import Devices

SPREAD = ("mode", "drafts", "stride", "target_speedup", "target_rounds", "rule", "tolerance", "warmup", "threads")
"""Options of `drp sample` that are passed to `parallelize`, except the devices."""
KEPT = ("rows", "shape", "steps", "devices", "ray", "guidance", *SPREAD)
"""Options of `drp sample` that also apply to a pipeline, except those of ALWAYS."""
CALL_ARGUMENTS = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
}
"""Arguments of a pipeline's call, and the options that define them."""
ALWAYS = ("seed", "out", "trace", "force", "as_json")


def pipeline_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --diffusers and its options to `drp sample`."""

    @click.option("--diffusers", metavar="PATH", help=f"Sample from a diffusers pipeline instead of MODEL: {KINDS}.")
    @click.option("-p", "--prompt", help="Prompt of the pipeline.")
    @click.option("--negative-prompt", help="Negative prompt of the pipeline.")
    @functools.wraps(command)
    def sample(
        model: str, diffusers: str | None, prompt: str | None, negative_prompt: str | None, **options: Any
    ) -> None:
        with plain_errors():
            if diffusers is not None:
                source = click.get_current_context().get_parameter_source
                given = {name for name in options if source(name) is not ParameterSource.DEFAULT}
                if source("model") is not ParameterSource.DEFAULT:
                    raise ValueError(f"{model!r} is a model and --diffusers names a pipeline; give one of them")
                _draw(diffusers, {**options, "prompt": prompt, "negative_prompt": negative_prompt}, given)
                return
            if prompt is not None or negative_prompt is not None:
                raise ValueError("--prompt needs a pipeline; give --diffusers PATH")
        command(model, **options)

    return sample


def _draw(path: str, options: Mapping[str, Any], given: set[str]) -> None:
    """Sample from the pipeline at `path`; `given` are the names of the options that the user gave."""
    lost = sorted(given - {*KEPT, *ALWAYS})
    if lost:
        raise ValueError(f"--{lost[0].replace('_', '-')} applies to drp's own models only; a pipeline has its own")
    if options["prompt"] is None:
        raise ValueError("prompt is missing; give --prompt TEXT")
    arguments = call_arguments(options)
    out: Path = options["out"] or Path("samples.png")
    check_output(out, options["force"])
    if options["trace"] is not None:
        check_file(options["trace"], options["force"])
    try:
        import torch

        from drp.diffusers import parallelize
        from drp.diffusers.devices import move_to_gpu
        from drp.diffusers.pipeline_modes import make_pipeline_mode
        from drp.leader.devices import parse_devices
    except ImportError as error:
        raise ValueError(f"{error}; pip install 'draft-refine[diffusers]'") from None

    devices, batch, here = _devices(options)
    count = len(parse_devices(devices, 1)) * batch
    names = ("rule", "tolerance", "warmup", "stride", "target_speedup", "target_rounds")
    mode = make_pipeline_mode(options["mode"], options["drafts"] or count, **{name: options[name] for name in names})
    if not mode.feedback:
        list(mode.rounds(options["steps"]))  # raises ValueError if a target cannot be reached
    pipe = load_pipeline(path)
    move_to_gpu(pipe, here)
    generator = torch.Generator().manual_seed(options["seed"])
    arguments |= {"output_type": "pt", "generator": generator, "num_images_per_prompt": options["rows"]}
    taken = inspect.signature(pipe.__call__).parameters
    unknown = [name for name in arguments if name not in taken]
    if unknown:
        raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]}; call it from Python, with drp.diffusers")
    chosen = {name: options[name] for name in SPREAD}
    chosen |= {"drafts_per_device": batch, "trace": options["trace"], "pretrained": _pretrained(path)}
    with parallelize(pipe, devices, **chosen) as run:
        images = pipe(**arguments).images
    write_samples(images.float() * 2 - 1, 1, out, scale=1)
    if options["as_json"]:
        facts = ("speedup", "theory")
        calls = [vars(call) | {name: getattr(call, name) for name in facts} for call in run.report.calls]
        print_json({"calls": calls, "out": out})
        return
    click.echo(str(run.report))
    click.echo(f"wrote {out}")


def call_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a pipeline's call that the options define; raise ValueError for an invalid shape."""
    found = {name: given[option] for name, option in CALL_ARGUMENTS.items() if given[option] is not None}
    if given["shape"] is not None:
        size = parse_numbers("shape", given["shape"])
        if len(size) != 2:
            raise ValueError(f"shape is {given['shape']!r}; a pipeline's is height and width, such as 512,768")
        found["height"], found["width"] = size
    return found


def _devices(options: Mapping[str, Any]) -> tuple[Devices, int, str]:
    """Return the devices, the number of drafts of each, and the devices that determine the pipeline's."""
    if options["ray"] is not None:
        workers = ray_devices(options["ray"], options["devices"], options["threads"])
        return workers, 1, "cuda" if workers.device == "cuda" else "cpu"
    devices, batch = pipeline_devices(options["devices"])
    return devices, batch, devices


def _pretrained(path: str) -> str:
    """Return the name by which other machines load the pipeline: of a folder, its whole path."""
    folder = Path(path).expanduser()
    return str(folder.absolute()) if folder.is_dir() else path
