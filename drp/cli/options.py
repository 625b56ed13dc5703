"""Options of several commands."""

from __future__ import annotations

import difflib
import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_DEFAULT_WORKERS = 4

F = TypeVar("F", bound=Callable[..., Any])

trace_option = click.option(
    "--trace", type=click.Path(path_type=Path), help="File to write a trace of the run to, for Perfetto."
)
trace_max_events_option = click.option(
    "--trace-max-events",
    type=click.IntRange(1),
    default=50_000,
    show_default=True,
    help="Number of newest events kept in the trace; 50,000 are about 200 runs of 48 steps.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output instead of text.")
force_option = click.option("-f", "--force", is_flag=True, help="Overwrite files that drp has not written.")


def _log(_: click.Context, __: click.Parameter, count: int) -> None:
    if count:
        level = logging.INFO if count == 1 else logging.DEBUG
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


verbose_option = click.option(
    "-v", "--verbose", count=True, expose_value=False, callback=_log, help="Log what happens; -vv logs more."
)


def _extend_path(_: click.Context, __: click.Parameter, folder: Path) -> None:
    if not folder.is_dir():
        raise click.BadParameter(f"folder {folder} does not exist")
    path = str(folder.resolve())
    if sys.path[:1] != [path]:  # Workers inherit this process's path.
        sys.path.insert(0, path)


app_dir_option = click.option(
    "--app-dir",
    type=click.Path(path_type=Path),
    default=Path(),
    expose_value=False,
    callback=_extend_path,
    help="Folder to import your own models from; by default the working directory.",
)


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Read the defaults of the command's options from a TOML file."""
    if path is None:
        return
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.BadParameter(f"{path} cannot be read: {error}") from None
    known = {parameter.name: parameter for parameter in context.command.params if parameter.name != "config"}
    values: dict[str, Any] = {}
    for key, value in found.items():
        name = "as_json" if key == "json" else key.replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, [each for each in known if each], 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; `{context.command_path} --help` lists the options"
            raise click.BadParameter(f"{path} has {key!r}, which is not an option of `{context.command_path}`{hint}")
        if isinstance(value, dict):
            raise click.BadParameter(f"{path}: {key} is a table; give a value, such as {key} = 1")
        joined = isinstance(value, list) and not known[name].multiple
        values[name] = ",".join(map(str, value)) if joined else value
    context.default_map = values


config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="TOML file with options by their long names, such as steps = 24. The command line takes precedence.",
)


OPTION_GROUPS = {
    "Run options": ("labels", "rows", "shape", "guidance", "seed", "diffusers", "prompt", "negative_prompt"),
    "Draft options": (
        *("steps", "mode", "drafts", "target_speedup", "target_rounds", "stride", "offsets", "rule", "tolerance"),
        *("warmup", "sweeps"),
    ),
    "Solver options": ("solver", "order", "eta", "spacing", "sigmas", "shift", "prediction_type"),
    "Leader options": ("devices", "threads", "drafts_per_device", "policy", "hedge", "start_timeout", "draft_timeout"),
    "Execution options": ("dispatch",),
}
"""The groups of options in the help of a command, by title. Other options are listed last."""


class GroupedCommand(click.Command):
    """A command whose help groups its options by OPTION_GROUPS."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        titles = {name: title for title, names in OPTION_GROUPS.items() for name in names}
        groups: dict[str, list[tuple[str, str]]] = {title: [] for title in (*OPTION_GROUPS, "Options")}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None and isinstance(parameter, click.Option):
                groups[titles.get(parameter.name or "", "Options")].append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class NumberRange(click.FloatRange):
    """A range of numbers that excludes NaN, which click accepts in every range."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        number = super().convert(value, parameter, context)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", parameter, context)
        return number


class DeviceDefaults(NamedTuple):
    """The devices that `drp sample` and `drp serve` use by default."""

    devices: str
    threads: int
    drafts_per_device: int


def default_devices() -> DeviceDefaults:
    """Return the GPUs if there are any, else the cores that this process may use, for at most four workers.

    With more drafts per round, samples differ more from the sequential ones, so that more than four are left to the
    user. A single GPU evaluates four drafts as one batch.
    """
    from drp.leader.gpus import find_gpus  # imports torch

    cores = len(os.sched_getaffinity(0))
    try:
        gpus = len(find_gpus())
    except ValueError:
        gpus = 0
    if not gpus:
        workers = min(cores, MAX_DEFAULT_WORKERS)
        return DeviceDefaults(f"{workers}xcpu", cores // workers, 1)
    if gpus == 1:
        return DeviceDefaults("cuda", 1, MAX_DEFAULT_WORKERS)
    return DeviceDefaults(f"{min(gpus, MAX_DEFAULT_WORKERS)}xcuda", 1, 1)


def pipeline_devices(given: str | None) -> tuple[str, int]:
    """Return the devices of a pipeline, by default those of this machine, and the drafts per device."""
    found = DeviceDefaults(given, 1, 1) if given else default_devices()
    return found.devices, found.drafts_per_device


def common_options(command: F) -> F:
    """Add --config, --app-dir and --verbose."""
    return config_option(app_dir_option(verbose_option(command)))
