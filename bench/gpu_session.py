"""The checks and the measurements for one GPU in eight minutes: `python -m bench.gpu_session [-o DIR]`.

The parts run one after the other, the most important first: the tests of pipelines, `bench.gpu_pipelines`,
`bench.worker_cost`, the other tests, `bench.gpu`. Each has a limit of time, after which it is ended and the next one
begins; what compiles is left out. A part that fails does not end the session. The output of all goes to
DIR/session.log, figures to JSON files beside it, which the benches write as they go. `--device cpu` tries the session
out with small models on cores.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

RESULTS = Path(__file__).with_name("results")
PYTEST = ("pytest", "-m", "gpu", "-q", "--durations=5", "-k", "not compile")


@dataclass(frozen=True)
class Part:
    """A module of Python that is run with arguments, for at most `limit` seconds."""

    name: str
    arguments: tuple[str, ...]
    limit: float


def parts(device: str, out: Path) -> list[Part]:
    """Return the parts of a session on a GPU such as cuda:0, or on the CPU."""
    pipelines, cost, gpu = (str(out / f"{name}.json") for name in ("gpu-pipelines", "worker-cost", "gpu"))
    if device == "cpu":
        tiny = ("--tiny", "--steps", "5", "--only", "sd15", "--compiled", "none")
        return [
            Part("tests", (*PYTEST, "tests/gpu"), 60),
            Part("pipelines", ("bench.gpu_pipelines", *tiny, "-o", pipelines), 120),
            Part("the cost of a worker", ("bench.worker_cost", "--device", "cpu", "--turns", "1", "-o", cost), 120),
            Part("batches", ("bench.gpu", "--device", "cpu", "--models", "dit", "--turns", "1", "-o", gpu), 180),
        ]
    graphs = ("--models", "unet", "--ways", "graphs", "--turns", "2")
    tests = ("test_ipc", "test_leader", "test_async_runs", "test_doctor")
    return [
        Part("tests of pipelines", (*PYTEST, "tests/gpu/test_pipelines.py"), 120),
        Part(
            "pipelines", ("bench.gpu_pipelines", "--devices", f"2x{device}", "--compiled", "none", "-o", pipelines), 170
        ),
        Part("the cost of a worker", ("bench.worker_cost", "--device", device, "--turns", "4", "-o", cost), 110),
        Part("other tests", (*PYTEST, *(f"tests/gpu/{name}.py" for name in tests)), 120),
        Part("batches", ("bench.gpu", "--device", device, *graphs, "-o", gpu), 120),
    ]


def run(part: Part, seconds: float, log: Path) -> str:
    """Run a part for at most so many seconds, its output at the end of the log; return in words how it ended."""
    with log.open("a") as file:
        print(f"\n==== {part.name}: python -m {' '.join(part.arguments)}", file=file, flush=True)
        began = time.perf_counter()
        process = subprocess.Popen(  # noqa: S603  # the parts above
            [sys.executable, "-m", *part.arguments], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            ended = f"exit code {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            ended = "ended at its limit"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return f"{part.name}: {ended} after {time.perf_counter() - began:.0f} s"


@click.command()
@click.option("--device", default="cuda:0", show_default=True, help="A GPU; cpu tries the session out.")
@click.option("--minutes", default=8.0, show_default=True, help="The limit of all parts together.")
@click.option("-o", "--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(device: str, minutes: float, out: Path) -> None:
    """Run all parts, and print how each ended."""
    out.mkdir(parents=True, exist_ok=True)
    log, deadline = out / "session.log", time.perf_counter() + 60 * minutes
    log.write_text("")
    for part in parts(device, out):
        left = min(part.limit, deadline - time.perf_counter())
        click.echo(run(part, left, log) if left > 0 else f"{part.name}: not begun, the time is up")
    click.echo(f"wrote {log}")


if __name__ == "__main__":
    main()
