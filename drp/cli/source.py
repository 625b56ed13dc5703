"""The subject of `drp compare` and `drp tune`: a model, or a diffusers pipeline with the arguments of its call."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from drp.cli.helpers import parse_numbers
from drp.cli.leader_options import leader_options, make_leader_options
from drp.cli.options import NumberRange, pipeline_devices
from drp.cli.pipeline import call_arguments
from drp.cli.sample import parse_labels
from drp.pipelines import find_factory, is_pipeline, load_pipeline
from drp.sampling.predictions import PREDICTION_TYPES
from drp.sampling.registry import SOLVER_NAMES

if TYPE_CHECKING:
    from drp.comparison.subject import Subject

OF_MODELS = ("labels", "solver", "prediction_type", "shift", "drafts_per_device", "hedge", "dispatch", "ray")
OF_PIPELINES = ("prompt", "negative_prompt", "call", "split_guidance")


def source_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the argument and the options of a subject; the command receives them as the mapping `source`."""
    more = ("policy", "start_timeout", "draft_timeout")
    names = ("pipeline", "devices", "threads", "steps", "guidance", "shape", *OF_MODELS, *OF_PIPELINES, *more)

    @click.argument("pipeline", default="digits")
    @click.option("-p", "--prompt", help="Prompt of a pipeline.")
    @click.option("--negative-prompt", help="Negative prompt of a pipeline.")
    @click.option("--call", help="Further arguments of a pipeline's call, in JSON: '{\"num_frames\": 16}'.")
    @click.option(
        "--split-guidance", is_flag=True, help="Evaluate the two branches of a pipeline's guidance on two devices."
    )
    @leader_options
    @click.option(
        "-n",
        "--steps",
        type=click.IntRange(1),
        help="Steps; by default 48 for a model, and the pipeline's own default.",
    )
    @click.option("--guidance", type=float, help="Scale of classifier-free guidance.")
    @click.option("--shape", help="Shape of a sample, such as 4,32,32, or height and width of a pipeline, 512,768.")
    @click.option("-l", "--labels", help="Classes of a model, used in turn by the seeds: 3,1,4 or 0-9.")
    @click.option("--solver", type=click.Choice(SOLVER_NAMES), help="Solver of a model; by default ddim.")
    @click.option(
        "--prediction-type", type=click.Choice(PREDICTION_TYPES), help="What a model predicts; by default epsilon."
    )
    @click.option("--shift", type=NumberRange(0, min_open=True), help="Shift of a model's flow-matching grid.")
    @functools.wraps(command)
    def wrapped(**options: Any) -> None:
        given = {name: options.pop(name) for name in names}
        command(source=given, **options)

    return wrapped


def make_subject(source: Mapping[str, Any]) -> Subject:
    """Return the subject; raise ValueError for options that it does not have."""
    from drp.leader.devices import parse_devices

    name: str = source["pipeline"]
    call = _parse_call(source["call"])
    if source["devices"] is not None and source["ray"] is None:
        parse_devices(source["devices"], 1)  # raises ValueError before a pipeline is loaded
    made = load_if_pipeline(name)
    return _model(name, source) if made is None else _pipeline(name, made, source, call)


def load_if_pipeline(name: str) -> Any:
    """Return the pipeline of this name, None if it is a built-in model or the factory of a model."""
    from drp.models.registry import BUILT_IN

    if name in BUILT_IN:
        return None
    if ":" in name:
        made = find_factory(name)()
        return made if is_pipeline(made) else None
    return load_pipeline(name, list(BUILT_IN))


def _parse_call(text: str | None) -> dict[str, Any]:
    """Parse the arguments of `--call`."""
    try:
        call = json.loads(text) if text is not None else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"call is {text!r:.80}, which is not valid JSON: {error}") from None
    if not isinstance(call, dict):
        raise ValueError(f"call is {text!r:.80}; give an object with the arguments by name")
    return call


def _refuse(source: Mapping[str, Any], names: tuple[str, ...], kind: str) -> None:
    default: dict[str, Any] = {"split_guidance": False, "dispatch": "auto"}
    for name in names:
        if source[name] != default.get(name):
            raise ValueError(f"--{name.replace('_', '-')} applies to {kind} only")


def _model(name: str, source: Mapping[str, Any]) -> Subject:
    from drp.comparison.models import ModelSubject

    _refuse(source, OF_PIPELINES, f"a diffusers pipeline, and {name} is a model")
    options = {key: source[key] for key in ("guidance", "solver", "prediction_type") if source[key] is not None}
    if source["shape"] is not None:
        options["shape"] = parse_numbers("shape", source["shape"])
    if source["shift"] is not None:
        options["grid"] = {"shift": source["shift"]}
    return ModelSubject(
        name,
        make_leader_options(source),
        labels=None if source["labels"] is None else parse_labels(source["labels"]),
        steps=source["steps"] or 48,
        **options,
    )


def _pipeline(name: str, pipe: Any, source: Mapping[str, Any], call: dict[str, Any]) -> Subject:
    from drp.diffusers.comparison import PipelineSubject
    from drp.diffusers.devices import move_to_gpu

    _refuse(source, OF_MODELS, f"a model of drp's, and {name} is a pipeline; use --call")
    call |= call_arguments(source)
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    devices, _ = pipeline_devices(source["devices"])
    move_to_gpu(pipe, devices)
    split = {"split_guidance": True} if source["split_guidance"] else {}
    return PipelineSubject(pipe, call, devices, threads=source["threads"], name=name, **split)
