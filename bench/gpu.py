"""What are batched drafts worth on one GPU, and what does a worker cost? `python -m bench.gpu`. Not yet run on one.

Three questions, with denoisers of a real size in bfloat16, eager and as captured graphs:

- evaluations: n drafts one after the other against the same n as one batch. A round takes one batch, so with equal
  numbers of evaluations this is the bound of what batching gains.
- runs: the plain loop, one worker in sequential mode, and one worker with n drafts as one batch; all in turn, so that
  a GPU that gets warm is warm for all.
- rounds: the time of a round with four workers on one GPU and next to nothing to evaluate.

`--device cpu` is a trial of the bench itself, with small models: its figures mean nothing.
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
from bench.gpu_models import MODELS
from drp import GpuOptions, Leader
from drp.leader.gpus import find_gpus
from drp.leader.request import Request, make_job
from drp.models import load
from drp.models.gpu import on_device
from drp.models.registry import Denoiser
from drp.sampling.modes import Sequential
from drp.sampling.reference import run_reference

RESULTS = Path(__file__).with_name("results")
DRAFTS = (2, 4, 8)
STEPS = 48


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
    """Return the seconds of whole runs by each way, and what each is worth against the plain loop."""
    job = make_job(Request(steps=STEPS, seed=1), denoiser.spec, 1).to(device)
    where = f"cuda:{device.index}" if device.type == "cuda" else "cpu:0"
    model = f"bench.gpu_models:{name}"

    def plain() -> None:
        run_reference(denoiser.predict, job.solver, Sequential(), job.start, {})

    found: dict[str, Any] = {}
    for n in (1, *DRAFTS):
        with Leader(model, devices=where, drafts_per_device=n, gpu=gpu, start_timeout=900, draft_timeout=600) as leader:
            mode = "sequential" if n == 1 else "aggressive"

            def led(leader: Leader = leader, mode: str = mode) -> None:
                leader.sample(steps=STEPS, seed=1, mode=mode)

            times = in_turn({"plain": plain, "led": led}, device, turns)
            theory = leader.sample(steps=STEPS, seed=1, mode=mode).theory
        gain = [a / b for a, b in zip(times["plain"], times["led"], strict=True)]
        found[str(n)] = {name: percentile(each, 50) for name, each in times.items()}
        found[str(n)] |= {"gain": percentile(gain, 50), "cost": 1 / percentile(gain, 50) - 1, "theory": theory}
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
    """Return the seconds of each way, one after the other in each turn; the first two turns warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 2):
        for name, way in ways.items():
            settle(device)
            began = time.perf_counter()
            way()
            settle(device)
            if turn > 1:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def settle(device: torch.device) -> None:
    """Wait for what the device has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tables(title: str, figures: dict[str, Any]) -> list[Table]:
    """Return the tables of one model."""
    ms = Table("n", "in turn, ms", "as one batch, ms", "gain", title=f"{title}: n evaluations")
    for n, row in figures["evaluations"].items():
        ms.add_row(n, f"{row['serial']:.2f}", f"{row['batched']:.2f}", f"{row['gain']:.2f}")
    s = Table("drafts", "plain loop, s", "worker, s", "gain", "of n GPUs", title=f"{title}: runs of {STEPS} steps")
    for n, row in figures["runs"].items():
        s.add_row(n, f"{row['plain']:.3f}", f"{row['led']:.3f}", f"{row['gain']:.3f}", f"{row['theory']:.2f}")
    return [ms, s]


@click.command()
@click.option(
    "--device", default="cuda:0", show_default=True, help="A GPU; cpu tries the bench out, with small models."
)
@click.option("--models", default="unet,dit", show_default=True, help="Which, with commas between.")
@click.option("--turns", default=10, show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=RESULTS / "gpu.json", show_default=True)
def main(device: str, models: str, turns: int, out: Path) -> None:
    """Measure on one GPU."""
    torch.set_num_threads(1)
    place = torch.device(device)
    figures: dict[str, Any] = {
        "machine": machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "device": "cpu: a trial, not a measurement",
    }
    ways = {"eager": GpuOptions()}
    if place.type == "cuda":
        try:
            gpu = find_gpus()[place.index or 0]
        except ValueError as error:
            console().print(f"nothing was measured: {error}")
            return
        place = torch.device("cuda", gpu.index)
        torch.cuda.set_device(place)
        figures["device"] = f"{gpu.name}, torch {torch.__version__}, CUDA {torch.version.cuda}"
        ways = {"eager": GpuOptions(dtype="bfloat16"), "graphs": GpuOptions(dtype="bfloat16", graphs=True)}
    for name in models.split(","):
        model = name if place.type == "cuda" else f"small_{name}"
        assert model in MODELS, model
        for way, options in ways.items():
            denoiser = load(f"bench.gpu_models:{model}")
            if place.type == "cuda":
                denoiser = on_device(denoiser, place, options.on(gpu.uuid, max(DRAFTS)))
            found = {
                "evaluations": evaluations(denoiser, place, turns),
                "runs": runs(model, denoiser, place, options, turns),
            }
            figures.setdefault(model, {})[way] = found
            console().print(*tables(f"{model}, {way}", found))
    figures["round_us"] = rounds(place, turns)
    console().print(f"a round with nothing to evaluate, us: {figures['round_us']}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n")
    console().print(f"wrote {out}")


if __name__ == "__main__":
    main()
