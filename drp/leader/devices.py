"""Device names, and the processor cores to which each device's worker is pinned."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

from drp.leader.gpus import Gpu, find_gpus, has_gpus, visible
from drp.leader.remote import RemoteWorkers
from drp.limits import MAX_WORKERS
from drp.protocol.messages import Emulated, Values

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
MAX_SECONDS = 3600
BYTES = {"GB/s": 1e9, "MB/s": 1e6, "KB/s": 1e3}
NUMBER = r"(\d{1,9}(?:\.\d{1,9})?)"


@dataclass(frozen=True)
class Device:
    """The device of one worker: its name, the cores to which the worker is pinned, and what it emulates, if any."""

    name: str
    cores: tuple[int, ...]
    emulated: Emulated | None = None
    gpu: str | None = None
    """The GPU's UUID, None for other devices. A GPU's number may differ between processes."""
    remote: RemoteWorkers | None = None
    """The workers to which this one belongs if it is on another machine, where its device has a name of its own."""


Devices: TypeAlias = "int | str | RemoteWorkers | Sequence[str | RemoteWorkers]"


def parse_devices(
    devices: Devices, threads: int, find: Callable[[], tuple[Gpu, ...]] = find_gpus
) -> tuple[Device, ...]:
    """Return one device for each worker: those of this machine in the order of their names, then those of others.

    `devices` is a count, a name, a sequence of names, or names separated by commas; `8xNAME` repeats a name eight
    times. A count means GPUs if CUDA shows any, else cores; see `expand_count`. The names are:

    - `cpu:I`, the I-th of the cores that this process may use, or `cpu`, the next core in turn. A worker with several
      threads uses the following cores as well. If there are more workers than cores, they share cores.
    - `emulated:TIME`, a worker on the next core in turn that takes TIME (`20ms`, `500us`, `1s`) for each evaluation.
      Any of these options may follow: `emulated:20ms:jitter=10%:straggler=3x@5%:link=50us@10GB/s`.
      jitter: the standard deviation of the normally distributed time, as a share of TIME.
      straggler: the factor by which the given share of the evaluations takes longer.
      link: the latency of each draft and each prediction and, after the @, optionally the bandwidth.
      values: `model` (the default) evaluates the model, within TIME if that is long enough. `recorded` evaluates the
      model once for each draft and repeats its prediction when the same draft is sent again. `cheap` computes a
      function of the draft and the timestep at almost no cost. See `drp.workers.emulated` and
      `drp.workers.prediction_cache`.
    - `cuda:I`, the I-th GPU that CUDA shows, `cuda:UUID`, the GPU whose UUID is or begins with this, or `cuda`, the
      next GPU in turn. Its worker runs on the cores of the GPU's NUMA node. Several workers may share a GPU: `4xcuda`
      with one GPU starts four workers on it. One leader uses either GPUs or other devices. `find` returns the GPUs.

    Beside names there may be one `RemoteWorkers`, whose devices are named where its workers run.

    Raises ValueError for an unknown device; the message lists the available ones.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads is {threads!r}; a worker needs 1 or more")
    local, remote = split_devices(devices)
    names = _names(expand_count(local, None, find))
    elsewhere = remote.count if remote is not None else 0
    if not 1 <= len(names) + elsewhere <= MAX_WORKERS:
        raise ValueError(f"{len(names) + elsewhere} devices; a run needs 1 to {MAX_WORKERS}")
    here = _on_this_machine(names, threads, find)
    return *here, *(Device(f"remote:{len(here) + place}", (), remote=remote) for place in range(elsewhere))


def split_devices(devices: Devices) -> tuple[int | str | Sequence[str], RemoteWorkers | None]:
    """Return the devices of this machine and the workers on others; raise ValueError for several kinds of those."""
    if isinstance(devices, RemoteWorkers):
        return (), devices
    if isinstance(devices, int | str) or not isinstance(devices, Sequence):
        return devices, None
    remote = [each for each in devices if isinstance(each, RemoteWorkers)]
    if len(remote) > 1:
        raise ValueError(f"devices holds {len(remote)} RemoteWorkers; a leader listens at one address, so give one")
    local = [each for each in devices if not isinstance(each, RemoteWorkers)]
    return local if remote else devices, remote[0] if remote else None  # type: ignore[return-value]  # without remote


def _on_this_machine(names: Sequence[str], threads: int, find: Callable[[], tuple[Gpu, ...]]) -> tuple[Device, ...]:
    cores = sorted(os.sched_getaffinity(0))
    placed = []
    if any(_is_gpu(name) for name in names):
        if not all(_is_gpu(name) for name in names):
            raise ValueError(f"devices is {names!r:.80}; GPUs and other devices do not mix: a leader has either")
        gpus = cache(find)
        return tuple(_on_gpu(name, turn, gpus, cores) for turn, name in enumerate(names))
    for turn, name in enumerate(names):
        first = turn * threads % len(cores)
        kind, _, rest = name.partition(":")
        if kind == "cpu" and re.fullmatch(r"cpu(:\d{1,4})?", name):
            first = int(rest) if rest else first
        elif kind != "emulated":
            raise ValueError(
                f"device {name!r} does not exist; drp runs on {_known(cores)}, cuda:0 and so on, emulated:TIME"
            )
        if first >= len(cores):
            raise ValueError(f"device {name!r} does not exist; this process may use {_known(cores)}")
        own = tuple(cores[(first + i) % len(cores)] for i in range(min(threads, len(cores))))
        emulated = parse_emulated(name, turn) if kind == "emulated" else None
        placed.append(Device(name if emulated else f"cpu:{first}", own, emulated))
    return tuple(placed)


def expand_count(
    devices: int | str | Sequence[str],
    kind: str | None,
    find: Callable[[], tuple[Gpu, ...]] = find_gpus,
    first: int = 0,
) -> str | Sequence[str]:
    """Expand a count to that many device names of a kind, "cpu" or "cuda"; return names unchanged.

    The kind None means "cuda" if CUDA shows a GPU, else "cpu". Workers may share a core, but a count of GPUs means
    distinct ones, from the one with the index `first` on: raises ValueError if there are fewer, and for any other kind.
    """
    if isinstance(devices, str) and re.fullmatch(r"-?\d{1,6}", devices):
        devices = int(devices)
    if isinstance(devices, bool):
        raise ValueError(f"devices is {devices!r}; give a count, or names such as 'cpu:0'")
    if not isinstance(devices, int):
        return devices
    if not 1 <= devices <= MAX_WORKERS:
        raise ValueError(f"devices is {devices}; a run needs 1 to {MAX_WORKERS}")
    kind = kind or ("cuda" if has_gpus() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"devices is {devices}, but there are no workers on {kind} devices; name cpu or cuda ones")
    if kind == "cpu":
        return ["cpu"] * devices
    if (count := len(find())) < devices:
        there = "is one GPU" if count == 1 else f"are {count} GPUs"
        raise ValueError(
            f"devices is {devices}, but there {there}; ask for at most {count}, or name them: '{devices}xcuda' has "
            f"workers share GPUs, '{devices}xcpu' are cores"
        )
    return [f"cuda:{(first + number) % count}" for number in range(devices)]


def _is_gpu(name: str) -> bool:
    return name.partition(":")[0] == "cuda"


def _on_gpu(name: str, turn: int, find: Callable[[], tuple[Gpu, ...]], cores: Sequence[int]) -> Device:
    """Return the device for a GPU's name."""
    wanted = name.partition(":")[2]
    if not re.fullmatch(r"cuda(:(\d{1,4}|(GPU-|MIG-)?[0-9a-fA-F-]{4,40}))?", name):
        raise ValueError(f"device {name!r} is not a GPU; write cuda, cuda:0, or cuda: and a UUID from nvidia-smi -L")
    try:
        gpus = find()
    except ValueError as error:
        raise ValueError(f"device {name!r} cannot be used: {error}") from None
    if not wanted:
        found = [gpus[turn % len(gpus)]]
    elif re.fullmatch(r"\d{1,4}", wanted):
        found = [gpu for gpu in gpus if gpu.index == int(wanted)]
    else:
        start = wanted.lower() if wanted.startswith(("GPU-", "MIG-")) else f"gpu-{wanted.lower()}"
        found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(start)]
    if len(found) != 1:
        fault = "does not exist" if not found else "is more than one GPU"
        raise ValueError(f"device {name!r} {fault}; {visible(os.environ, gpus)}")
    return Device(f"cuda:{found[0].index}", found[0].cores or tuple(cores), gpu=found[0].uuid)


def parse_emulated(name: str, number: int) -> Emulated:
    """Parse `emulated:TIME[:OPTION...]` for the worker with this number; see `parse_devices`."""
    _, time, *options = name.split(":") if ":" in name else (name, "")
    fields: dict[str, Any] = {}
    try:
        seconds = parse_time(time)
        for option in options:
            new = _emulated_option(option)
            if not fields.keys().isdisjoint(new):
                raise ValueError(f"{option.partition('=')[0]} is given twice; give it once")
            fields |= new
        if fields.get("jitter", 0) > 1 or fields.get("straggler_share", 0) > 1:
            raise ValueError("jitter and the share of stragglers are at most 100%")
    except ValueError as error:
        raise ValueError(f"device {name!r}: {error}") from None
    return Emulated(number, seconds, **fields)


def _emulated_option(option: str) -> dict[str, Any]:
    """Parse one option of an emulated device into fields of `Emulated`."""
    key, _, value = option.partition("=")
    if jitter := re.fullmatch(f"jitter={NUMBER}%", option):
        return {"jitter": float(jitter[1]) / 100}
    if straggler := re.fullmatch(f"straggler={NUMBER}x@{NUMBER}%", option):
        return {"straggler_factor": float(straggler[1]), "straggler_share": float(straggler[2]) / 100}
    if key == "link":
        latency, bandwidth = parse_link(value)
        return {"latency": latency, "bandwidth": bandwidth}
    if key == "values" and value in typing.get_args(Values):
        return {"values": value}
    raise ValueError(
        f"{option!r} is not an option of an emulated device; "
        "give jitter=10%, straggler=3x@5%, link=50us@10GB/s or values=cheap (recorded, model), separated by colons"
    )


def parse_time(text: str) -> float:
    """Parse a time such as `20ms`, `500us` or `1s`, in seconds; raise ValueError if the text is not a time."""
    found = re.fullmatch(f"{NUMBER}(s|ms|us)", text)
    if not found or float(found[1]) * SECONDS[found[2]] > MAX_SECONDS:
        raise ValueError(f"{text!r} is not a time up to {MAX_SECONDS} s; write 20ms, 500us or 1s")
    return float(found[1]) * SECONDS[found[2]]


def parse_link(text: str) -> tuple[float, float]:
    """Parse `LATENCY[@BANDWIDTH]`, such as `50us@10GB/s`, in seconds and bytes per second; 0 is no limit."""
    latency, limited, bandwidth = text.partition("@")
    return parse_time(latency), parse_rate(bandwidth) if limited else 0.0


def parse_bytes(text: str) -> int:
    """Parse a size such as `64KiB` or `8MiB`, in bytes; raise ValueError if the text is not a size."""
    found = re.fullmatch(f"{NUMBER}(KiB|MiB|GiB)", text)
    if not found:
        raise ValueError(f"{text!r} is not a size; write 64KiB, 8MiB or 1GiB")
    return round(float(found[1]) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[found[2]])


def parse_rate(text: str) -> float:
    """Parse a rate such as `10GB/s`, in bytes per second; raise ValueError if the text is not a rate above 0."""
    found = re.fullmatch(f"{NUMBER}([GMK]B/s)", text)
    if not found or not float(found[1]):
        raise ValueError(f"{text!r} is not a rate above 0; write 10GB/s, 500MB/s or 100KB/s")
    return float(found[1]) * BYTES[found[2]]


def _names(devices: str | Sequence[str]) -> list[str]:
    if isinstance(devices, str):
        devices = devices.split(",")
    if not isinstance(devices, Sequence):
        raise ValueError(f"devices is {devices!r}; give a count, or names such as 'cpu:0'")
    for name in devices:
        if not isinstance(name, str):
            raise ValueError(f"devices holds {name!r}; give a count, or names such as 'cpu:0'")
    counted = [re.fullmatch(r"(?:(\d{1,6})x)?(.*)", name.strip(), re.DOTALL) for name in devices]
    if sum(int(found[1] or 1) for found in counted if found) > MAX_WORKERS:
        raise ValueError(f"devices is {devices!r:.80}; a run needs 1 to {MAX_WORKERS}")
    return [found[2] for found in counted if found for _ in range(int(found[1] or 1))]


def _known(cores: Sequence[int]) -> str:
    return "cpu:0" if len(cores) == 1 else f"cpu:0 to cpu:{len(cores) - 1}"
