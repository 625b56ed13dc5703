"""What are batched drafts worth on one GPU, and what does a worker cost? `python -m bench.gpu`. Not yet run on one.

Three questions, with denoisers of a real size in bfloat16, eager and as captured graphs:

- evaluations: n drafts one after the other against the same n as one batch. A round takes one batch, so with equal
  numbers of evaluations this is the bound of what batching gains.
- runs: the plain loop, one worker in sequential mode, and one worker with n drafts as one batch; all in turn, so that
  a GPU that gets warm is warm for all.
- rounds: the time of a round with four workers on one GPU and next to nothing to evaluate.

It needs no network: weights are at random, the configurations are here. It is laid out for about five minutes on an
H200; `--models unet` and then `--models dit`, or `--ways graphs`, divide it. `--device cpu` is a trial of the bench
itself, with small models: its figures mean nothing.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table
from torch import Tensor

from bench.figures import console, machine, percentile
from drp import GpuOptions, Leader
from drp.leader.devices import parse_devices
from drp.leader.request import Request, make_job
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
    "eager": GpuOptions(dtype="bfloat16"),
    "graphs": GpuOptions(dtype="bfloat16", graphs=True),
    "compiled": GpuOptions(dtype="bfloat16", graphs=True, compile=True),
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


def runs(name: str, denoiser: Denoiser, device: torch.device, gpu: GpuOptions, turns: int) -> dict[str, Any]:
    """Return the seconds of whole runs by each way, and what each is worth against the plain loop.

    `cost_us` is what an evaluation takes longer by way of a worker than in the plain loop, in microseconds.
    """
    job = make_job(Request(steps=STEPS, seed=1), denoiser.spec, 1).to(device)
    where = f"cuda:{device.index}" if device.type == "cuda" else "cpu:0"
    model = f"bench.gpu_models:{name}"

    def plain() -> None:
        run_reference(denoiser.predict, job.solver, Sequential(), job.start, {})

    found: dict[str, Any] = {}
    with Leader(
        model, devices=where, drafts_per_device=max(DRAFTS), gpu=gpu, start_timeout=900, draft_timeout=600
    ) as leader:
        for n in (1, *DRAFTS):
            mode = "sequential" if n == 1 else "aggressive"

            def led(mode: str = mode, n: int = n) -> None:
                leader.sample(steps=STEPS, seed=1, mode=mode, drafts=n)

            times = in_turn({"plain": plain, "led": led}, device, turns)
            theory = leader.sample(steps=STEPS, seed=1, mode=mode, drafts=n).theory
            gain = percentile([a / b for a, b in zip(times["plain"], times["led"], strict=True)], 50)
            found[str(n)] = {name: percentile(each, 50) for name, each in times.items()}
            found[str(n)] |= {"gain": gain, "cost": 1 / gain - 1, "theory": theory}
    alone = found["1"]
    alone["cost_us"] = (alone["led"] - alone["plain"]) / STEPS * 1e6
    return found


def rounds(device: torch.device, turns: int) -> dict[str, float]:
    """Return the microseconds of a round with one worker and with four, on this device, that have nothing to do."""
    where = f"cuda:{device.index}" if device.type == "cuda" else "cpu:0"
    found = {}
    for workers in (1, 4):
        with Leader("bench.gpu_models:Tiny", devices=f"{workers}x{where}") as leader:
            times = []
            for turn in range(turns + 1):
                run = leader.sample(steps=201, seed=turn, mode="aggressive" if workers > 1 else "sequential")
                times += [run.seconds / run.rounds * 1e6] if turn else []
        found[str(workers)] = percentile(times, 50)
    return found


def in_turn(ways: dict[str, Callable[[], None]], device: torch.device, turns: int) -> dict[str, list[float]]:
    """Return the seconds of each way, one after the other in each turn; the first turn warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            settle(device)
            began = time.perf_counter()
            way()
            settle(device)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def settle(device: torch.device) -> None:
    """Wait for what the device has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def judge(figures: dict[str, Any], models: list[str]) -> list[dict[str, Any]]:
    """Return what was promised of GPUs, each with the figure for a model as graphs, and whether it holds."""
    found = []
    for model in models:
        if "graphs" in figures[model]:
            of = figures[model]["graphs"]["runs"]
            promises = (
                ("one worker costs at most 1 % over the plain loop", of["1"]["cost"], of["1"]["cost"] <= MOST_COST),
                ("4 drafts as one batch gain 1.5 over the plain loop", of["4"]["gain"], of["4"]["gain"] >= GAIN),
            )
            found += [{"model": model, "promise": p, "figure": f, "holds": holds} for p, f, holds in promises]
    return found


def tables(title: str, figures: dict[str, Any]) -> list[Table]:
    """Return the tables of one model."""
    ms = Table("n", "in turn, ms", "as one batch, ms", "gain", title=f"{title}: n evaluations")
    for n, row in figures["evaluations"].items():
        ms.add_row(n, f"{row['serial']:.2f}", f"{row['batched']:.2f}", f"{row['gain']:.2f}")
    s = Table("drafts", "plain loop, s", "worker, s", "gain", "of n GPUs", title=f"{title}: runs of {STEPS} steps")
    for n, row in figures["runs"].items():
        s.add_row(n, f"{row['plain']:.3f}", f"{row['led']:.3f}", f"{row['gain']:.3f}", f"{row['theory']:.2f}")
    return [ms, s]


def verdict(promises: list[dict[str, Any]]) -> Table:
    """Return the table of what was promised."""
    table = Table("model", "promise", "figure", "holds", title="promises, as graphs in bfloat16")
    for row in promises:
        table.add_row(row["model"], row["promise"], f"{row['figure']:.3f}", "yes" if row["holds"] else "NO")
    return table


@click.command()
@click.option(
    "--device", default="cuda:0", show_default=True, help="A GPU; cpu tries the bench out, with small models."
)
@click.option("--models", default="unet,dit", show_default=True, help="Which, with commas between.")
@click.option(
    "--ways",
    default="eager,graphs",
    show_default=True,
    help="Which: eager, graphs, compiled, with commas between; compiling takes minutes a model.",
)
@click.option("--turns", default=5, show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=RESULTS / "gpu.json", show_default=True)
def main(device: str, models: str, ways: str, turns: int, out: Path) -> None:
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
        names, options = [f"small_{name}" for name in models.split(",")], {"eager": GpuOptions()}
    else:
        place = torch.device("cuda", index_of(placed.gpu))
        torch.cuda.set_device(place)
        what = f"{torch.cuda.get_device_name(place)}, torch {torch.__version__}, CUDA {torch.version.cuda}"
        names, options = models.split(","), {way: WAYS[way] for way in ways.split(",")}
    now = datetime.datetime.now(datetime.timezone.utc)
    figures: dict[str, Any] = {"machine": machine(), "date": now.isoformat(), "device": what}
    for name in names:
        figures[name] = {}
        for way, how in options.items():
            denoiser = load(f"bench.gpu_models:{name}")
            if placed.gpu is not None:
                denoiser = on_device(denoiser, place, how.on(placed.gpu, max(DRAFTS)))
            figures[name][way] = {
                "evaluations": evaluations(denoiser, place, turns),
                "runs": runs(name, denoiser, place, how, turns),
            }
            console().print(*tables(f"{name}, {way}", figures[name][way]))
    figures["round_us"] = rounds(place, turns)
    console().print(f"a round with nothing to evaluate, us, by workers on the one device: {figures['round_us']}")
    figures["promises"] = judge(figures, names)
    if figures["promises"]:
        console().print(verdict(figures["promises"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n")
    console().print(f"wrote {out}")


if __name__ == "__main__":
    main()
