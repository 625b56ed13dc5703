"""The checks and the measurements for one GPU in eight minutes: `python -m bench.gpu_session [-o DIR]`.

The parts run one after the other, the most important first; `--parts` selects some. Each is a process with a limit of
time, and a part that fails, hangs or is ended at its limit does not end the session. The output of all goes to
DIR/session.log, how each part ended to DIR/session.json, and figures to JSON files beside them, all as they come.
Printed last is a summary: what failed first, each with the end of its output. `--device cpu` tries the session out
with small models on cores. The exit status is 1 if a part failed.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import click

RESULTS = Path(__file__).with_name("results")
PYTEST = ("pytest", "-m", "gpu", "-v", "-W", "default", "--tb", "short", "--durations=5", "-p", "no:cacheprovider")
"""Warnings are no errors here: those of other versions of packages would hide what a GPU does."""
EAGER = ("-k", "not compile")
STACK_TIMEOUT = 5.0
"""Seconds in which a process that is ended at its limit writes where its threads are."""
TAIL = 25
"""Lines of the output of a part that failed, in the summary."""


@dataclass(frozen=True)
class Part:
    """A module of Python that is run with arguments, for at most `limit` seconds."""

    name: str
    arguments: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Ended:
    """How a part ended: in words, after how many seconds, whether it failed, and the end of its output."""

    name: str
    command: str
    how: str
    seconds: float
    failed: bool
    output: list[str]


def parts(device: str, out: Path) -> list[Part]:
    """Return the parts of a session on a GPU such as cuda:0, or on the CPU."""

    def to(name: str) -> tuple[str, str]:
        return "-o", str(out / f"{name}.json")

    if device == "cpu":
        tiny = ("--tiny", "--steps", "5", "--turns", "1", "--only", "sd15", "--compiled", "none")
        return [
            Part("facts", ("bench.gpu_facts",), 60),
            Part("tests", (*PYTEST, *EAGER, "tests/gpu"), 60),
            Part("sd15", ("bench.gpu_pipelines", *tiny, *to("gpu-sd15")), 120),
            Part(
                "cost",
                ("bench.worker_cost", "--device", "cpu", "--model", "dit", "--turns", "1", *to("worker-cost")),
                120,
            ),
            Part("batches", ("bench.gpu", "--device", "cpu", "--models", "dit", "--turns", "1", *to("gpu")), 180),
        ]
    pipelines = ("bench.gpu_pipelines", "--devices", f"2x{device}", "--turns", "2")
    eager = (*pipelines, "--compiled", "none")
    graphs = ("--models", "unet", "--ways", "graphs", "--turns", "2")
    first, other = ("test_ipc", "test_doctor"), ("test_async_runs", "test_several_gpus", "test_leader")
    return [
        Part("facts", ("bench.gpu_facts",), 60),
        Part("ipc", (*PYTEST, *(f"tests/gpu/{name}.py" for name in first)), 80),
        Part("tests", (*PYTEST, *EAGER, "tests/gpu/test_pipelines.py"), 130),
        Part("sd15", (*eager, "--only", "sd15", *to("gpu-sd15")), 100),
        Part("sdxl", (*eager, "--eager", "--only", "sdxl", *to("gpu-sdxl")), 90),
        Part("flux", (*eager, "--eager", "--only", "flux", *to("gpu-flux")), 80),
        Part("cost", ("bench.worker_cost", "--device", device, "--turns", "3", *to("worker-cost")), 110),
        Part("compiled", (*pipelines, "--only", "flux", "--compiled", "only", *to("gpu-compiled")), 200),
        Part("batches", ("bench.gpu", "--device", device, *graphs, *to("gpu")), 100),
        Part("other", (*PYTEST, *EAGER, *(f"tests/gpu/{name}.py" for name in other)), 300),
    ]


def run(part: Part, seconds: float, log: Path) -> Ended:
    """Run a part for at most so many seconds, its output at the end of the log."""
    command = f"python -m {' '.join(part.arguments)}"
    began, ended = time.perf_counter(), ""
    with log.open("a") as file:
        print(f"\n==== {part.name}: {command}", file=file, flush=True)
        start = file.tell()
        process = subprocess.Popen(  # noqa: S603  # the parts above
            [sys.executable, "-m", *part.arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
        )
        try:
            ended = f"exit code {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            ended = "ended at its limit"
            process.send_signal(signal.SIGABRT)  # faulthandler then writes where the threads are.
            with suppress(subprocess.TimeoutExpired):
                process.wait(STACK_TIMEOUT)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # Its workers too.
            process.wait()
    took = time.perf_counter() - began
    with log.open(errors="replace") as file:
        file.seek(start)
        output = [line.rstrip() for line in file][-TAIL:]
    return Ended(part.name, command, ended, round(took, 1), ended != "exit code 0", output)


def summary(ended: Sequence[Ended], rest: Sequence[str]) -> str:
    """Return what failed and why, then how the other parts ended, and which were not begun."""
    lines = []
    for each in ended:
        if each.failed:
            lines += [f"FAILED: {each.name}: {each.how} after {each.seconds:.0f} s: {each.command}"]
            lines += [f"    {line[:200]}" for line in each.output]
    lines += [f"passed: {each.name} in {each.seconds:.0f} s" for each in ended if not each.failed]
    lines += [f"not begun, the time was up: {name}; run it with --parts {name}" for name in rest]
    return "\n".join(lines)


@click.command()
@click.option("--device", default="cuda:0", show_default=True, help="A GPU; cpu tries the session out.")
@click.option("--minutes", default=8.0, show_default=True, help="The limit of all parts together.")
@click.option("--parts", "names", help="Names of parts, separated by commas; by default all.")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(device: str, minutes: float, names: str | None, out: Path) -> None:
    """Run all parts, and print how each ended."""
    planned = parts(device, out)
    wanted = [part.name for part in planned] if names is None else names.split(",")
    if unknown := set(wanted) - {part.name for part in planned}:
        raise click.BadParameter(
            f"{', '.join(sorted(unknown))}: the parts are {', '.join(part.name for part in planned)}",
            param_hint="--parts",
        )
    planned = [part for part in planned if part.name in wanted]
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # SIGABRT dumps core.
    out.mkdir(parents=True, exist_ok=True)
    log, deadline = out / "session.log", time.perf_counter() + 60 * minutes
    log.write_text("")
    ended: list[Ended] = []
    for part in planned:
        left = min(part.limit, deadline - time.perf_counter())
        if left <= 0:
            break
        ended.append(run(part, left, log))
        (out / "session.json").write_text(json.dumps([asdict(each) for each in ended], indent=1) + "\n")
        click.echo(f"{part.name}: {ended[-1].how} after {ended[-1].seconds:.0f} s")
    click.echo(f"\n{summary(ended, [part.name for part in planned[len(ended) :]])}\nwrote {log}")
    if any(each.failed for each in ended):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
