"""What are batched drafts worth on one GPU, and what does a worker cost? `python -m bench.gpu`.

Three questions, with denoisers of a real size in bfloat16, eager and as captured graphs:

- evaluations: n drafts one after the other against the same n as one batch. A round takes one batch, so with equal
  numbers of evaluations this is the bound of what batching gains.
- runs: the plain loop, one worker in sequential mode, and one worker with n drafts as one batch, dispatched
  synchronously and asynchronously; all in turn, so that a GPU that gets warm is warm for all.
- rounds: the time of a round with one and four workers on one GPU and next to nothing to evaluate.

What was measured is written after each part, so that a run that is broken off has something to show.

It needs no network: weights are at random, the configurations are here. It is laid out for about five minutes on an
H200; `--models unet` and then `--models dit`, or `--ways graphs`, divide it. `--device cpu` is a trial of the bench
itself, with small models: its figures mean nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor

from bench.figures import console, machine, percentile
from bench.speedup import DISPATCHES
from drp import ExecutionOptions, Leader, Result
from drp.leader.devices import parse_devices
from drp.leader.job import make_job
from drp.leader.request import Request
from drp.models import load
from drp.models.gpu import on_device
from drp.models.registry import Denoiser
from drp.protocol.cuda import index_of
from drp.sampling.modes import Sequential
from drp.sampling.reference import run_reference

RESULTS = Path(__file__).with_name("results")
DRAFTS = (2, 4, 8)
STEPS = 48
MOST_COST, GAIN = 0.01, 1.5
WAYS = {
    "eager": ExecutionOptions(dtype="bfloat16"),
    "graphs": ExecutionOptions(dtype="bfloat16", graphs=True),
    "compiled": ExecutionOptions(dtype="bfloat16", graphs=True, compile=True),
}


def evaluations(denoiser: Denoiser, device: torch.device, turns: int) -> dict[str, Any]:
    """Return the milliseconds of n evaluations in turn and as one batch, the medians over the turns."""
    assert denoiser.spec.sample_shape is not None
    found: dict[str, Any] = {}
    for n in (1, *DRAFTS):
        one = torch.randn(1, *denoiser.spec.sample_shape, device=device)
        many, t = torch.cat([one] * n), torch.full((n,), 500.0, device=device)

        def serial(one: Tensor = one, t: Tensor = t, n: int = n) -> None:
            for _ in range(n):
                denoiser.predict(one, t[:1], {})

        def batched(many: Tensor = many, t: Tensor = t) -> None:
            denoiser.predict(many, t, {})

        with torch.inference_mode():
            times = in_turn({"serial": serial, "batched": batched}, device, turns)
        gain = [a / b for a, b in zip(times["serial"], times["batched"], strict=True)]
        found[str(n)] = {name: percentile(each, 50) * 1e3 for name, each in times.items()}
        found[str(n)]["gain"] = percentile(gain, 50)
    return found


def runs(name: str, denoiser: Denoiser, device: torch.device, gpu: ExecutionOptions, turns: int) -> dict[str, Any]:
    """Return the seconds of whole runs by each way, and what each is worth against the plain loop.

    `cost_us` is what an evaluation takes longer by way of a worker than in the plain loop, in microseconds.
    """
    job = make_job(Request(steps=STEPS, seed=1), denoiser.spec, 1).to(device)
    where = f"cuda:{device.index}" if device.type == "cuda" else "cpu:0"
    model = f"bench.gpu_models:{name}"

    def plain() -> None:
        run_reference(denoiser.predict, job.solver, Sequential(), job.start, {})

    found: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        leaders = {
            dispatch: stack.enter_context(
                Leader(
                    model,
                    devices=where,
                    drafts_per_device=max(DRAFTS),
                    execution=replace(gpu, dispatch=dispatch),
                    start_timeout=900,
                    draft_timeout=600,
                )
            )
            for dispatch in DISPATCHES
        }
        for n in (1, *DRAFTS):
            asked: dict[str, Any] = {"seed": 1, "mode": "sequential" if n == 1 else "aggressive", "drafts": n}

            def led(dispatch: str, asked: dict[str, Any] = asked) -> Result:
                return leaders[dispatch].sample(steps=STEPS, **asked)

            ways = {dispatch: functools.partial(led, dispatch) for dispatch in DISPATCHES}
            times = in_turn({"plain": plain, **ways}, device, turns)
            found[str(n)] = {way: percentile(each, 50) for way, each in times.items()}
            found[str(n)]["theory"] = led(DISPATCHES[0]).theory
            for dispatch in DISPATCHES:
                gains = [a / b for a, b in zip(times["plain"], times[dispatch], strict=True)]
                found[str(n)][f"gain_{dispatch}"] = percentile(gains, 50)
    alone = found["1"]
    for dispatch in DISPATCHES:
        alone[f"cost_{dispatch}"] = 1 / alone[f"gain_{dispatch}"] - 1
        alone[f"cost_us_{dispatch}"] = (alone[dispatch] - alone["plain"]) / STEPS * 1e6
    return found


def rounds(device: torch.device, turns: int, memory: str) -> dict[str, dict[str, float]]:
    """Return the microseconds of a round with one worker and with four, on this device, that have nothing to do."""
    where = f"cuda:{device.index}" if device.type == "cuda" else "cpu:0"
    found: dict[str, dict[str, float]] = {dispatch: {} for dispatch in DISPATCHES}
    for workers, dispatch in itertools.product((1, 4), DISPATCHES):
        gpu = ExecutionOptions(dispatch=dispatch, memory=memory)
        with Leader("bench.gpu_models:Tiny", devices=f"{workers}x{where}", execution=gpu) as leader:
            times = []
            for turn in range(turns + 1):
                run = leader.sample(steps=201, seed=turn, mode="aggressive" if workers > 1 else "sequential")
                times += [run.seconds / run.rounds * 1e6] if turn else []
        found[dispatch][str(workers)] = percentile(times, 50)
    return found


def in_turn(
    ways: dict[str, Callable[[], object]],
    device: torch.device,
    turns: int,
    after_turn: Callable[[dict[str, list[float]]], object] = lambda seconds: None,
) -> dict[str, list[float]]:
    """Return the seconds of each way, one after the other in each turn; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            synchronize(device)
            began = time.perf_counter()
            way()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - began)
        after_turn(seconds)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for what the device has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def judge(figures: dict[str, Any], models: list[str]) -> list[dict[str, Any]]:
    """Return what was promised of GPUs, each with the figure for a model as graphs, and whether it holds."""
    found = []
    for model in models:
        if "graphs" in figures[model]:
            of = figures[model]["graphs"]["runs"]
            for dispatch in DISPATCHES:
                cost, gain = of["1"][f"cost_{dispatch}"], of["4"][f"gain_{dispatch}"]
                promises = (
                    ("one worker costs at most 1 % over the plain loop", cost, cost <= MOST_COST),
                    ("4 drafts as one batch gain 1.5 over the plain loop", gain, gain >= GAIN),
                )
                found += [
                    {"model": model, "dispatch": dispatch, "promise": p, "figure": f, "holds": holds}
                    for p, f, holds in promises
                ]
    return found


def tables(title: str, figures: dict[str, Any]) -> list[Table]:
    """Return the tables of one model."""
    ms = Table("n", "in turn, ms", "as one batch, ms", "gain", title=f"{title}: n evaluations")
    for n, row in figures["evaluations"].items():
        ms.add_row(n, f"{row['serial']:.2f}", f"{row['batched']:.2f}", f"{row['gain']:.2f}")
    titles = [text for dispatch in DISPATCHES for text in (f"worker, {dispatch}, s", "gain")]
    s = Table("drafts", "plain loop, s", *titles, "of n GPUs", title=f"{title}: runs of {STEPS} steps")
    for n, row in figures["runs"].items():
        cells = [text for each in DISPATCHES for text in (f"{row[each]:.3f}", f"{row[f'gain_{each}']:.3f}")]
        s.add_row(n, f"{row['plain']:.3f}", *cells, f"{row['theory']:.2f}")
    return [ms, s]


def goals_table(promises: list[dict[str, Any]]) -> Table:
    """Return the table of what was promised."""
    table = Table("model", "dispatch", "promise", "figure", "holds", title="promises, as graphs in bfloat16")
    for row in promises:
        table.add_row(
            row["model"],
            row["dispatch"],
            row["promise"],
            f"{row['figure']:.3f}",
            "yes" if row["holds"] else "NO",
        )
    return table


def write(out: Path, figures: dict[str, Any]) -> None:
    """Write what there is so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n")


@click.command()
@click.option(
    "--device", default="cuda:0", show_default=True, help="A GPU; cpu tries the bench out, with small models."
)
@click.option("--models", default="unet,dit", show_default=True, help="Models, separated by commas.")
@click.option(
    "--ways",
    default="eager,graphs",
    show_default=True,
    help="Ways, separated by commas: eager, graphs, compiled; compiling takes minutes a model.",
)
@click.option(
    "--memory",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "host"]),
    help="Where runs lie: on the host, the leader takes no time of the GPU.",
)
@click.option("--turns", default=5, show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=RESULTS / "gpu.json", show_default=True)
def main(device: str, models: str, ways: str, memory: str, turns: int, out: Path) -> None:
    """Measure on one GPU."""
    torch.set_num_threads(1)
    for option, given, known in (("--models", models, ("unet", "dit")), ("--ways", ways, tuple(WAYS))):
        for each in given.split(","):
            if each not in known:
                raise click.BadParameter(f"{each!r} is none of {', '.join(known)}", param_hint=option)
    try:
        placed = parse_devices(device, 1)[0]
    except ValueError as error:
        console().print(f"nothing was measured: {error}")
        return
    if placed.gpu is None:
        place, what = torch.device("cpu"), "cpu: a trial, not a measurement"
        names, options = [f"small_{name}" for name in models.split(",")], {"eager": ExecutionOptions()}
    else:
        place = torch.device("cuda", index_of(placed.gpu))
        torch.cuda.set_device(place)
        what = f"{torch.cuda.get_device_name(place)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
        names, options = models.split(","), {way: WAYS[way] for way in ways.split(",")}
    now = datetime.datetime.now(datetime.timezone.utc)
    figures: dict[str, Any] = {
        "machine": machine(),
        "date": now.isoformat(),
        "device": what,
        "memory": memory,
    }
    for name in names:
        figures[name] = {}
        for way, how in options.items():
            denoiser = load(f"bench.gpu_models:{name}")
            if placed.gpu is not None:
                denoiser = on_device(denoiser, place, how.worker_config(placed.gpu, max(DRAFTS)))
            figures[name][way] = {
                "evaluations": evaluations(denoiser, place, turns),
                "runs": runs(name, denoiser, place, replace(how, memory=memory), turns),
            }
            console().print(*tables(f"{name}, {way}", figures[name][way]))
            write(out, figures)
    figures["round_us"] = rounds(place, turns, memory)
    console().print(f"a round with nothing to evaluate, us, by workers on the one device: {figures['round_us']}")
    figures["promises"] = judge(figures, names)
    if figures["promises"]:
        console().print(goals_table(figures["promises"]))
    write(out, figures)
    console().print(f"wrote {out}")


if __name__ == "__main__":
    main()
