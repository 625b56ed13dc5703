"""`parallelize`: the calls of a pipeline's denoiser, answered from drafts; `reference`: the same without workers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from drp.diffusers.denoisers import find_denoisers
from drp.diffusers.devices import device_of, refuse_other_kind
from drp.diffusers.evaluators import InProcess
from drp.diffusers.parallel_pipeline import Parallel
from drp.diffusers.pipeline_modes import make_pipeline_modes
from drp.diffusers.pretrained import Pretrained
from drp.diffusers.structure import PatchedClassError
from drp.diffusers.workers import Workers, on_gpu_of
from drp.leader.devices import Devices, expand_count, parse_devices
from drp.leader.execution import ExecutionOptions
from drp.sampling.drafts import DraftRule
from drp.sampling.mode_selection import DEFAULT_TOLERANCE
from drp.sampling.modes import Mode
from drp.trace.record import check


@contextmanager
def parallelize(
    pipe: Any,
    devices: Devices | Workers = 2,
    mode: str | Mode = "window",
    *,
    drafts: int | None = None,
    stride: float | None = None,
    target_speedup: float | None = None,
    target_rounds: int | None = None,
    rule: str | DraftRule | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    warmup: int = 0,
    split_guidance: bool = False,
    always_draft: bool = False,
    threads: int | None = None,
    denoisers: Sequence[str] | None = None,
    pretrained: str | Mapping[str, Any] | None = None,
    start_timeout: float = 120.0,
    draft_timeout: float | None = 600.0,
    execution: ExecutionOptions | None = None,
    drafts_per_device: int = 1,
    trace: str | os.PathLike[str] | None = None,
    trace_max_events: int | None = None,
) -> Iterator[Parallel]:
    """Parallelize the calls of a diffusers pipeline over several devices, in a `with` block.

        with parallelize(pipe, devices=4) as run:
            image = pipe("an astronaut on a horse").images[0]
        print(run.report)

    The pipeline's own code runs unchanged in this process and thread. Only the calls of its denoiser are answered from
    drafts, which worker processes evaluate. After the block the pipeline is restored and the workers have ended; its
    weights stay in shared memory, of which there is one copy for all processes.

    devices: the number of devices, of the kind on which the pipeline runs, its own GPU first; or names, as in
        `drp.Leader`; or `Workers`, which several pipelines may share.
    mode, drafts, stride, target_speedup, target_rounds, rule, tolerance, warmup: as in `drp.sample` (docs/drafts.md).
        Modes that return to earlier steps or leave some out are refused: rolling, windows with gaps, and modes with
        sweeps. A call with too few steps for its target is sequential; the report says so.
    split_guidance: evaluate the two branches of classifier-free guidance on two devices, so that a round has half as
        many drafts as devices. If the branches are one doubled batch, its halves may have different bits.
    always_draft: also draft if drafted samples do not converge to the sequential ones with shorter steps: with
        schedulers that clip the data estimate, or draw new noise at every step, such as LCM. By default such calls are
        sequential; the report says why.
    threads: the number of threads of each worker, by default an equal share of this process's. Bits may depend on it.
    denoisers: the names of the components that the steps call, if they have unusual names.
    pretrained: for workers on other machines (`drp.RemoteWorkers`, `drp.on_ray`), which load the denoising modules
        themselves: the name or path of the pipeline, by default the one that it was loaded from; or a dict of
        further arguments of `from_pretrained`, such as {"revision": "...", "variant": "fp16"}; or
        "package.module:factory", which returns the pipeline. Modules that are not bit-identical there are refused, so
        changes after loading must be made in a factory.
    start_timeout, draft_timeout, execution: as in `drp.LeaderOptions`.
    drafts_per_device: evaluate this many drafts of a round as one batch, if the first step of a call verifies that the
        results are right. A round then has this many times as many drafts.
    trace: a file to which a trace is written, see `drp.trace`, with at most `trace_max_events` events.

    Raises ValueError for an unsuitable pipeline or invalid arguments, and WorkerError if a worker cannot start or has
    other weights. A worker that is lost during a call is replaced, and the samples keep their bits. Steps whose drafts
    cannot be verified or evaluated are taken sequentially in this process. `run.report` says which, and why.
    """
    if trace is not None:
        check(trace)
    names = find_denoisers(pipe, denoisers)
    device = device_of(pipe, names)
    if isinstance(devices, Workers):
        count, has_remote, batch = len(devices.devices), devices.has_remote, devices.drafts_per_device
    else:
        if isinstance(devices, int | str):
            devices = expand_count(devices, device.type, first=device.index or 0)
        placed = parse_devices(devices, 1)
        refuse_other_kind(device, placed)
        count, has_remote, batch = len(placed), any(each.remote is not None for each in placed), drafts_per_device
    source = Pretrained(pipe, pretrained) if has_remote else None
    drafts = _drafts(drafts, count * batch, split_guidance)
    modes = make_pipeline_modes(mode, drafts, rule, tolerance, warmup, stride, target_speedup, target_rounds)
    parallel = Parallel(pipe, modes, names, split_guidance, always_draft)
    with ExitStack() as stack:
        stack.callback(parallel.offload.leave)
        parallel.offload.enter()
        for name in names:  # Refuse modules that cannot be described before workers start.
            with suppress(PatchedClassError):  # Each call will be sequential; its report says so.
                parallel.describe(name)
        workers = (
            devices
            if isinstance(devices, Workers)
            else stack.enter_context(
                Workers(
                    devices,
                    threads=threads,
                    start_timeout=start_timeout,
                    draft_timeout=draft_timeout,
                    execution=on_gpu_of(device, execution),
                    drafts_per_device=drafts_per_device,
                )
            )
        )
        publisher = workers.publisher(device)
        if publisher is not None:
            stack.callback(publisher.close)
        if trace is not None:
            stack.enter_context(workers.record(trace, trace_max_events))
        parallel.enter(workers, publisher, source)
        stack.callback(parallel.leave)
        if source is not None:
            with suppress(PatchedClassError):  # as above
                workers.check({name: parallel.publish(name, parallel.describe(name)) for name in names})
        yield parallel


@contextmanager
def reference(
    pipe: Any,
    *,
    devices: int | str | Sequence[str] = 1,
    mode: str | Mode = "window",
    drafts: int | None = None,
    stride: float | None = None,
    target_speedup: float | None = None,
    target_rounds: int | None = None,
    rule: str | DraftRule | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
    warmup: int = 0,
    split_guidance: bool = False,
    always_draft: bool = False,
    threads: int | None = None,
    drafts_per_device: int = 1,
    denoisers: Sequence[str] | None = None,
) -> Iterator[Parallel]:
    """Do in this process what `parallelize` does on workers with the same arguments, with bit-identical results.

    Only the number of `devices` matters, for the default number of drafts per round.
    """
    names = find_denoisers(pipe, denoisers)
    placed = parse_devices(expand_count(devices, device_of(pipe, names).type), 1)
    own = threads or max(1, torch.get_num_threads() // len(placed))
    drafts = _drafts(drafts, len(placed) * drafts_per_device, split_guidance)
    modes = make_pipeline_modes(mode, drafts, rule, tolerance, warmup, stride, target_speedup, target_rounds)
    parallel = Parallel(pipe, modes, names, split_guidance, always_draft)
    with ExitStack() as stack:
        stack.callback(parallel.offload.leave)
        parallel.offload.enter()
        parallel.enter(InProcess(parallel.originals, own, drafts_per_device), None)
        stack.callback(parallel.leave)
        yield parallel


def _drafts(drafts: int | None, devices: int, split: bool) -> int:
    """Return the number of drafts per round: by default one per device, or per two devices with split guidance."""
    return drafts if drafts is not None else max(1, devices // 2) if split else devices
