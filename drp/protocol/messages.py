"""Messages: every one that passes between leader and worker, in the order of a session.

worker -> leader   Hello       I run, with this version of the protocol
leader -> worker   Load        load this model
worker -> leader   Loaded      what the model expects, and how its weights lie in memory
leader -> worker   Share       put the weights into (or take them from) this memory
worker -> leader   Shared      done
leader -> worker   WarmUp      to one on a GPU: compile, capture, warm
worker -> leader   WarmedUp    done
leader -> worker   Bind        a run begins: its memory
leader -> worker   Rebind      a run begins: its memory is the last one's
worker -> leader   Bound       I have the run's memory
leader -> worker   Draft       evaluate this slot
worker -> leader   Prediction  the answer is in the row
worker -> leader   EvaluationError  instead: it cannot be evaluated; I go on
leader -> worker   Unbind      the run is over
leader -> worker   Stop        end
worker -> leader   WorkerFailed  instead of any answer: the worker ends after it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from drp.protocol.codec import Bounds, Length, numbers

VERSION = 8
MAX_TENSORS = 1024
"""In a slot, or as conditions."""
MAX_BATCHED = 255
"""Drafts of a batch beside the first."""

Count = Annotated[int, Bounds(0, 2**31 - 1)]
Bytes = Annotated[int, Bounds(0, 2**48)]
Timestep = Annotated[float, Bounds(-1e9, 1e9)]
Seconds = Annotated[float, Bounds(0, 1e9)]
Fraction = Annotated[float, Bounds(0, 1)]
Shape = Annotated[tuple[Count, ...], Length(16)]
Name = Annotated[str, Length(200)]
Text = Annotated[str, Length(20_000)]
Opaque = Annotated[bytes, Length(64)]
Sequence = Annotated[int, Bounds(0, 2**32 - 1)]
Half = Literal["float16", "bfloat16"]
Values = Literal["model", "recorded", "cheap"]


@dataclass(frozen=True)
class ModelSpec:
    """What a model expects; None where it leaves that to the caller.

    `sample_shape` is one sample's shape, without the batch. `classes`: it takes labels 0..classes - 1. `guidance`: the
    scale of classifier-free guidance that it uses if not told otherwise.
    """

    sample_shape: Shape | None = None
    classes: Count | None = None
    guidance: Annotated[float, Bounds(-1e6, 1e6)] | None = None


@dataclass(frozen=True)
class Handle:
    """Shared memory: descriptor `fd` of the process `pid`, `nbytes` long."""

    pid: Count
    fd: Count
    nbytes: Bytes


@dataclass(frozen=True)
class PipeHandle:
    """The writing end of a pipe: descriptor `fd` of the process `pid`."""

    pid: Count
    fd: Count


@dataclass(frozen=True)
class GpuHandle:
    """Memory of a GPU, `nbytes` long, opened by CUDA IPC: whoever has this may read and write it. It is never logged.

    `device` is the UUID of the GPU where it lies, `memory` what cudaIpcGetMemHandle gives for it, `event` what
    cudaIpcGetEventHandle gives for its owner's event: recorded before each message that says to read there.
    """

    device: Name
    nbytes: Bytes
    memory: Opaque
    event: Opaque


@dataclass(frozen=True)
class TensorSpec:
    """A tensor in an arena: where, and what. `dtype` is a name from `memory.DTYPES`."""

    name: Name
    dtype: Name
    shape: Shape
    offset: Bytes


@dataclass(frozen=True)
class Hello:
    """The worker's first words."""

    version: Count
    pid: Count


@dataclass(frozen=True)
class Emulated:
    """A device that a worker stands in for: how long its evaluations take, in seconds, and how far away it is.

    An evaluation takes `seconds`, normally distributed with a standard deviation of `jitter` times that, and
    `straggler_factor` times as long for a share `straggler_share` of them. A draft and a prediction each travel for
    `latency` and their bytes at `bandwidth` bytes a second (0: at once). `values` says what it answers: what the model
    makes of the draft, evaluated each time or (`recorded`) once for each draft, or something cheap instead. `number`
    tells the draws of one device from another's.
    """

    number: Count
    seconds: Seconds
    jitter: Fraction = 0.0
    straggler_factor: Seconds = 1.0
    straggler_share: Fraction = 0.0
    latency: Seconds = 0.0
    bandwidth: Annotated[float, Bounds(0, 1e18)] = 0.0
    values: Values = "model"


@dataclass(frozen=True)
class GpuConfig:
    """How a model is to run on the GPU `device`, a UUID: in `dtype`, or as it is; compiled; as captured graphs.

    `batch` is how many drafts it will be given at once, at most. `probe` is memory of the leader's to be reached by
    CUDA IPC: the worker turns each of its bytes into 255 minus that, if it can. `nvtx`: what it does is named in NVTX
    ranges.
    """

    device: Name
    dtype: Half | None = None
    compile: bool = False
    graphs: bool = False
    batch: Count = 1
    probe: GpuHandle | None = None
    nvtx: bool = False


@dataclass(frozen=True)
class Load:
    """Load the model of this name; be this device, if one is to be emulated; run on this GPU, if one is named."""

    model: Name
    emulated: Emulated | None = None
    gpu: GpuConfig | None = None


@dataclass(frozen=True)
class Loaded:
    """The model is there, in the dtype that Load asks for.

    `layout` is a digest of the names, dtypes, shapes, strides and offsets of its `nbytes` of weights.

    `unreached` says why the probe could not be written to; empty if it was, or there was none.
    """

    spec: ModelSpec
    nbytes: Bytes
    layout: Name
    probe_error: Annotated[str, Length(2000)] = ""


@dataclass(frozen=True)
class Share:
    """Weights: copy yours in (`publish`) and use them from there, or only use them from there.

    Of `memory` and `gpu` exactly one is not None.
    """

    memory: Handle | None
    publish: bool
    gpu: GpuHandle | None = None


@dataclass(frozen=True)
class Shared:
    """The weights in use are the shared ones; or, if `unreached` says why, the worker's own: it has opened nothing."""

    error: Annotated[str, Length(2000)] = ""


@dataclass(frozen=True)
class WarmUp:
    """The weights are where they will stay: put what is left onto the GPU, compile, capture and warm, as Load said."""


@dataclass(frozen=True)
class WarmedUp:
    """Done."""


@dataclass(frozen=True)
class AsyncConfig:
    """How a worker answers drafts of a run before its device has evaluated them; see `drp.protocol.timeline`.

    From `stamps` on the arena has three int64 for each row. For an arena on the host the leader's line of records is
    at `lines`, and after it those of its `workers`, of which this one has the line number `own`, from 0 on. It rings
    the `bell` when that is wanted. For an arena on a GPU the leader records the event of that; the lines are in the
    memory `numbers`, on the host: there `own` is the worker's for good. `heard`: the worker says so when a draft is
    queued; else it says nothing of it.
    """

    completions: Bytes
    timelines: Bytes
    workers: Count
    index: Count
    acknowledge: bool
    counters: Handle | None = None
    wakeup: PipeHandle | None = None


@dataclass(frozen=True)
class Bind:
    """A run begins.

    Each of the `slots` holds a draft, the tensors `inputs`, and each of the `rows` a prediction, the tensors `outputs`,
    their offsets counted from where the draft or prediction begins (see `arena.Arena`). `cond` are what the denoiser is
    given with every draft, at offsets of the memory as a whole. Of `memory` and `gpu` exactly one is not None. Memory
    on the host that has the same `number` again is the same, and need not be opened again; 0 is none. `answer`: Bound
    is sent, for no draft comes with this that would show it. `order`: its drafts are answered ahead of the device.
    """

    run: Count
    memory: Handle | None
    slots: Count
    rows: Count
    inputs: Annotated[tuple[TensorSpec, ...], Length(MAX_TENSORS)]
    outputs: Annotated[tuple[TensorSpec, ...], Length(MAX_TENSORS)]
    cond: Annotated[tuple[TensorSpec, ...], Length(MAX_TENSORS)]
    gpu: GpuHandle | None = None
    number: Count = 0
    acknowledge: bool = True
    async_config: AsyncConfig | None = None


@dataclass(frozen=True)
class Bound:
    """The run's memory is mapped: its descriptor may be closed."""

    run: Count


@dataclass(frozen=True)
class BatchedDraft:
    """One more draft of the same run, its fields those of Draft."""

    index: Count
    timestep: Timestep
    slot: Count
    row: Count


@numbers
@dataclass(frozen=True)
class Draft:
    """Evaluate the draft in `slot` at `timestep`, and write the prediction to `row`; `index` is the grid's.

    Those in `also` are to be evaluated with it, as one batch in this order; one answer, for this draft, is for all.
    No two drafts that are under way have the same row: whoever is late writes where nobody reads.
    A draft with a `sequence`, which no other of the leader's has, is stamped with that number, and answered as soon as
    its evaluation is queued, or not at all, as the run's Order says. `after` is the number of the leader's record that
    it is to wait for, where records have numbers.
    """

    run: Count
    index: Count
    timestep: Timestep
    slot: Count
    row: Count
    sequence: Sequence = 0
    after: Count = 0
    batched: Annotated[tuple[BatchedDraft, ...], Length(MAX_BATCHED)] = ()


@numbers
@dataclass(frozen=True)
class Prediction:
    """The prediction is in `row`, and those of a batch are in theirs; evaluating took `seconds` by the worker's clock.

    The other times are when, in seconds of CLOCK_MONOTONIC, which all processes of a machine share: the draft was
    `received`, its evaluation `began`, the prediction was there (`predicted`), and it was in the row (`ended`).
    Of a draft with a sequence number the prediction will be there, its stamp behind it; only the first time is told.
    """

    run: Count
    index: Count
    row: Count
    seconds: Seconds
    received: Seconds = 0.0
    began: Seconds = 0.0
    predicted: Seconds = 0.0
    ended: Seconds = 0.0


@dataclass(frozen=True)
class EvaluationError:
    """The draft cannot be evaluated: the denoiser raised, or its prediction is none; the worker goes on.

    For a draft with a sequence number it may follow a Prediction.
    """

    run: Count
    index: Count
    row: Count
    error: Annotated[str, Length(2000)]
    traceback: Text


@dataclass(frozen=True)
class Unbind:
    """The run is over; its memory will not be read again. `keep`: Again may follow, until another's is kept."""

    run: Count
    keep: bool = False


@dataclass(frozen=True)
class Rebind:
    """A run begins whose Bind would be, but for `run` and `answer`, that of the run that was kept, which it ends."""

    run: Count
    acknowledge: bool = True


@dataclass(frozen=True)
class Stop:
    """End."""


@dataclass(frozen=True)
class WorkerFailed:
    """The worker cannot go on: what it was doing, the error in a line, and the traceback."""

    activity: Name
    error: Annotated[str, Length(2000)]
    traceback: Text


ToWorker = Load | Share | WarmUp | Bind | Rebind | Draft | Unbind | Stop
ToLeader = Hello | Loaded | Shared | WarmedUp | Bound | Prediction | EvaluationError | WorkerFailed

TO_WORKER: dict[str, type[ToWorker]] = {
    kind.__name__: kind for kind in (Load, Share, WarmUp, Bind, Rebind, Draft, Unbind, Stop)
}
TO_LEADER: dict[str, type[ToLeader]] = {
    kind.__name__: kind for kind in (Hello, Loaded, Shared, WarmedUp, Bound, Prediction, EvaluationError, WorkerFailed)
}
