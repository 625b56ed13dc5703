"""What one worker costs on a GPU, in parts: `python -m bench.worker_cost`, and `--device cpu` to try the script itself.

Every row is an evaluation's time by one way, beside the plain loop's in the same turn; all ways follow one another in
each turn. What they tell, from the top:

- another process: a process that takes turns with this one, told by a pipe, without arithmetic, sockets or drafts. It
  has the switches between two processes on one GPU, and their wake-ups. `polling`: both spin instead of sleeping.
- one worker, its run on the host: the leader's arithmetic runs on its cores.
- one worker, its run on the GPU: the leader's kernels run there too, between the worker's.

It has not been run on a GPU yet. With MPS both processes share one context: start `nvidia-cuda-mps-control -d`, and run
it again; the first line says whether MPS is on.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
import torch.multiprocessing
from rich.table import Table

from bench.figures import console, machine, percentile
from bench.gpu import RESULTS, in_turn, write
from drp import ExecutionOptions, Leader
from drp.leader.job import make_job
from drp.leader.request import Request
from drp.models import load
from drp.models.gpu import on_device
from drp.protocol.cuda import uuid_of
from drp.sampling.modes import Sequential
from drp.sampling.reference import run_reference

STEPS = 48
PATIENCE = 600.0
"""Seconds within which the other process starts and evaluates."""


def evaluate_in_turns(model: str, device: torch.device, options: ExecutionOptions, pipe: Connection) -> None:
    """Evaluate once for each message, and answer when the device is done; the message says whether to poll next."""
    _use(device)
    denoiser = on_device(load(model), device, options.worker_config("", 1))
    assert denoiser.spec.sample_shape is not None
    x = torch.zeros(1, *denoiser.spec.sample_shape, device=device)
    t = torch.full((1,), 500.0, device=device)
    pipe.send(True)
    polls = False
    with torch.inference_mode():
        while True:
            while polls and not pipe.poll(0):
                pass
            polls = pipe.recv()
            if polls is None:
                return
            denoiser.predict(x, t, {})
            _finish(device)
            pipe.send(True)


def take_turns(pipe: Connection, polls: bool) -> None:
    """Have the other process evaluate as often as a run has steps."""
    for _ in range(STEPS):
        pipe.send(polls)
        while polls and not pipe.poll(0):
            pass
        pipe.recv()


@contextlib.contextmanager
def other_process(model: str, device: torch.device, options: ExecutionOptions) -> Iterator[Connection]:
    """Start a process that evaluates in turns with this one."""
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=evaluate_in_turns, args=(model, device, options, theirs), daemon=True)
    process.start()
    try:
        if not ours.poll(PATIENCE):
            raise TimeoutError(f"the other process was not ready within {PATIENCE:g} s")
        ours.recv()
        yield ours
        ours.send(None)
        process.join(10)
    finally:
        process.kill()


def _use(device: torch.device) -> None:
    """Make a GPU the current one, on which models of `bench.gpu_models` are made."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def ways(model: str, device: torch.device, stack: contextlib.ExitStack) -> dict[str, Callable[[], object]]:
    """Return the ways to evaluate as often as a run has steps."""
    on_gpu = device.type == "cuda"
    options = ExecutionOptions(dtype="bfloat16", graphs=True) if on_gpu else ExecutionOptions()
    denoiser = on_device(load(model), device, options.worker_config(uuid_of(device.index) if on_gpu else "", 1))
    job = make_job(Request(steps=STEPS, seed=1), denoiser.spec, 1).to(device)
    found: dict[str, Callable[[], object]] = {
        "the plain loop": lambda: run_reference(denoiser.predict, job.solver, Sequential(), job.start, {})
    }
    pipe = stack.enter_context(other_process(model, device, options))
    found["another process"] = functools.partial(take_turns, pipe, False)
    found["another process, polling"] = functools.partial(take_turns, pipe, True)
    for memory, dispatch in itertools.product(("host", "auto") if on_gpu else ("auto",), ("sync", "async")):
        fields: dict[str, Any] = {**vars(options), "memory": memory, "dispatch": dispatch}
        place = "on the host" if memory == "host" or not on_gpu else "on the GPU"
        name = f"one worker, its run {place}, {dispatch}"
        try:
            leader = stack.enter_context(
                Leader(
                    model,
                    devices=f"cuda:{device.index}" if on_gpu else "cpu:0",
                    execution=ExecutionOptions(**fields),
                    start_timeout=PATIENCE,
                    draft_timeout=PATIENCE,
                )
            )
        except (RuntimeError, ValueError) as error:  # A WorkerError is a RuntimeError; the other ways are measured.
            console().print(f"PROBLEM: {name}: {error}", markup=False)
            continue
        found[name] = functools.partial(leader.sample, steps=STEPS, seed=1, mode="sequential")
    return found


def table(times: dict[str, list[float]]) -> Table:
    """Return the table: the time of an evaluation, and its cost over the plain loop's of the same turn."""
    made = Table("way", "an evaluation, us", "more than the plain loop, us", "%", title=f"{STEPS} steps, medians")
    plain = times["the plain loop"]
    for name, each in times.items():
        more = percentile([(a - b) / STEPS * 1e6 for a, b in zip(each, plain, strict=True)], 50)
        share = percentile([a / b - 1 for a, b in zip(each, plain, strict=True)], 50)
        made.add_row(name, f"{percentile(each, 50) / STEPS * 1e6:.0f}", f"{more:.0f}", f"{share * 100:.1f}")
    return made


@click.command()
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--model", default="unet", show_default=True, help="A factory of bench.gpu_models.")
@click.option("--turns", default=7, show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=RESULTS / "worker-cost.json", show_default=True)
def main(device: str, model: str, turns: int, out: Path) -> None:
    """Print what each part of a worker costs."""
    began = time.perf_counter()
    where = torch.device(device)
    mps = "on" if os.path.exists(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps") + "/control") else "off"  # noqa: PTH110, S108  # where NVIDIA's daemon listens
    facts = machine() | {"mps": mps, "device": device, "steps": STEPS}
    console().print_json(data=facts)
    _use(where)
    if where.type == "cpu":
        torch.set_num_threads(1)
        model = f"small_{model}"
    with contextlib.ExitStack() as stack:
        found = ways(f"bench.gpu_models:{model}", where, stack)
        console().print(f"all ways are ready after {time.perf_counter() - began:.0f} s")
        with torch.inference_mode():
            times = in_turn(found, where, turns, lambda so_far: write(out, {"machine": facts, "seconds": so_far}))
    console().print(table(times))
    console().print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
