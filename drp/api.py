"""The two functions most users need: `sample` on workers, `reference` in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import Unpack

from drp import models
from drp.leader.devices import Devices
from drp.leader.execution import ExecutionOptions
from drp.leader.job import make_job
from drp.leader.leader import Leader, model_name
from drp.leader.options import LeaderArguments, LeaderOptions
from drp.leader.request import Request, RequestArguments, make_request
from drp.models.finite import check_finite
from drp.protocol.messages import ModelSpec
from drp.sampling.advice import warn
from drp.sampling.options import check_names
from drp.sampling.reference import run_reference
from drp.sampling.result import Result
from drp.torch_defaults import torch_defaults
from drp.torch_threads import torch_threads
from drp.trace.record import check, record


class SampleArguments(LeaderArguments, RequestArguments, total=False):
    """The keyword arguments of `sample`: those of a leader and those of a run."""


def sample(
    model: str | Callable[[], Any] = "digits",
    *,
    trace: str | os.PathLike[str] | None = None,
    **arguments: Unpack[SampleArguments],
) -> Result:
    """Start workers, sample once, and end the workers.

    The arguments are the fields of `drp.LeaderOptions` and of `drp.leader.request.Request`; `trace` is a file to which
    a trace is written, see `drp.trace`. `result.samples` is float32 [B, ...], for `digits` [B, 1, 28, 28] in about
    [-1, 1]. To sample more than once, use a `drp.Leader`.
    """
    if trace is not None:
        check(trace)
    leader_options, options = divide_arguments(arguments)
    check_options(model, leader_options.drafts, options)
    with (
        Leader(model, leader_options) as leader,
        record(leader, trace) if trace is not None else nullcontext(),
    ):
        return leader.sample(**options)


def divide_arguments(arguments: Mapping[str, Any]) -> tuple[LeaderOptions, RequestArguments]:
    """Divide arguments into those of the leader and those of the run."""
    given: dict[str, Any] = {**arguments}
    names = [each.name for each in fields(LeaderOptions)]
    check_names(given, [*names, *(each.name for each in fields(Request))])
    leader = LeaderOptions(**{name: given.pop(name) for name in names if name in given})
    return leader, cast("RequestArguments", given)


def check_options(model: str | Callable[[], Any], drafts: int, options: RequestArguments) -> None:
    """Raise ValueError for invalid options of a run, before workers start. `drafts` is the default per round.

    A model of the user's own is not loaded for this. Labels and shape are checked against it when it is loaded.
    """
    request = make_request(options)
    spec = models.describe(model_name(model))
    if spec is None:
        spec = ModelSpec()
        if request.shape is None:
            tensors = (request.noise, request.image, request.out)
            shapes = [tensor.shape[1:] for tensor in tensors if isinstance(tensor, torch.Tensor)]
            request = replace(request, shape=[*shapes[0]] if shapes else [1])
    make_job(request, spec, drafts)


def reference(
    model: str | Callable[[], Any] = "digits",
    *,
    devices: Devices = 1,
    threads: int = 1,
    drafts_per_device: int = 1,
    execution: ExecutionOptions | None = None,
    **options: Unpack[RequestArguments],
) -> Result:
    """Sample in this process. The samples are bit-identical to those of `sample` with the same arguments.

    Only the number of `devices` matters, for the default number of drafts per round; with GPUs, everything is computed
    on the first one. As in a worker, torch uses `threads` threads and its default settings, drafts are evaluated in
    batches of `drafts_per_device`, and FloatingPointError is raised if the denoiser returns NaN or infinity.
    """
    leader = LeaderOptions(devices, threads, drafts_per_device, execution=execution or ExecutionOptions())
    placed = leader.worker_devices
    request = make_request(options)
    with torch_defaults():
        denoiser = models.load(model_name(model))
        job = make_job(request, denoiser.spec, leader.drafts)
        warn(job.solver.grid.steps, job.mode.width, job.solver.adds_noise)
        device = torch.device("cpu")
        if placed[0].gpu is not None:
            from drp.models.gpu import on_device  # Imported here, so that CUDA is not used without a GPU.
            from drp.protocol.cuda import index_of

            device = torch.device("cuda", index_of(placed[0].gpu))
            denoiser = on_device(denoiser, device, leader.execution.worker_config(placed[0].gpu, drafts_per_device))
        job = job.to(device)
        cond = {name: value.to(device).contiguous() for name, value in job.cond.items()}

        def predict(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            predicted = denoiser(x, t, cond)
            check_finite({"x": predicted}, {"x": x})
            return predicted

        with torch_threads(threads):
            result = run_reference(
                predict,
                job.solver,
                job.mode,
                job.start,
                cond,
                request.callback,
                job.fresh,
                job.watch,
                drafts_per_device,
            )
    there = job.out is None and result.samples.is_cpu
    return result if there else replace(result, samples=job.samples(result.samples))
