"""The messages between leader and worker, in the order of a session.

worker -> leader   Hello            the worker runs and speaks this version of the protocol
leader -> worker   Load             load this model
worker -> leader   Loaded           what the model expects, and the layout of its weights
leader -> worker   Share            copy the weights to this memory, or use those in it
worker -> leader   Shared           the weights are shared
leader -> worker   WarmUp           compile, capture and warm up; only for workers on GPUs
worker -> leader   WarmedUp         the worker is warm
leader -> worker   Bind             a run begins, with this memory
leader -> worker   Rebind           a run begins, with the memory of the previous one
worker -> leader   Bound            the worker has opened the run's memory
leader -> worker   Draft            evaluate the draft in this slot
worker -> leader   Prediction       the prediction is in its row
worker -> leader   EvaluationError  the draft cannot be evaluated; the worker continues
leader -> worker   Unbind           the run is over
leader -> worker   Stop             end
worker -> leader   WorkerFailed     the worker cannot continue and ends

Only over TCP, with a worker on another machine:

leader -> worker   Ping             answer with the worker's clock
worker -> leader   Pong             the worker's clock
leader -> worker   Rejected         the leader does not use this worker, which ends
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from drp.protocol.codec import Bounds, Length, numbers
from drp.protocol.handles import Bytes, Count, GpuHandle, Handle, Name, PipeHandle

VERSION = 9
MAX_TENSORS = 1024
"""Maximum number of tensors of a draft, of a prediction or of conditions."""
MAX_BATCHED = 255
"""Maximum number of drafts of a batch, in addition to the first."""

Timestep = Annotated[float, Bounds(-1e9, 1e9)]
Seconds = Annotated[float, Bounds(0, 1e9)]
Fraction = Annotated[float, Bounds(0, 1)]
Shape = Annotated[tuple[Count, ...], Length(16)]
Text = Annotated[str, Length(20_000)]
Sequence = Annotated[int, Bounds(0, 2**32 - 1)]
Half = Literal["float16", "bfloat16"]
Values = Literal["model", "recorded", "cheap"]


@dataclass(frozen=True)
class ModelSpec:
    """What a model expects.

    sample_shape: the shape of one sample, without the batch; None if the caller chooses it.
    classes: the model takes labels from 0 to `classes` - 1; None if it takes none.
    guidance: the default scale of classifier-free guidance; None without guidance.
    """

    sample_shape: Shape | None = None
    classes: Count | None = None
    guidance: Annotated[float, Bounds(-1e6, 1e6)] | None = None


@dataclass(frozen=True)
class TensorSpec:
    """The offset, dtype and shape of a tensor in an arena. `dtype` is a name from `memory.DTYPES`."""

    name: Name
    dtype: Name
    shape: Shape
    offset: Bytes


@dataclass(frozen=True)
class Hello:
    """The first message of a worker.

    host, device, gpu: where a worker on another machine is: the machine's name, the device's name there, and the
        device's UUID if it is a GPU. Empty for a worker that the leader has started.
    """

    version: Count
    pid: Count
    host: Name = ""
    device: Name = ""
    gpu: Name = ""


@dataclass(frozen=True)
class Emulated:
    """An emulated device: the times of its evaluations and of its link, in seconds.

    number: identifies the device's random draws.
    seconds: the mean time of an evaluation.
    jitter: the standard deviation of the normally distributed time, as a share of `seconds`.
    straggler_factor: the factor by which the share `straggler_share` of the evaluations takes longer.
    latency: the time in which a draft or a prediction reaches its receiver.
    bandwidth: bytes per second of the link, in addition to the latency; 0 for unlimited.
    values: "model" evaluates the model for every draft, "recorded" once for each draft, "cheap" computes a cheap
        function instead.
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
    """How a model runs on a GPU.

    device: the UUID of the GPU.
    dtype: the dtype of weights and evaluation; None for the model's own.
    compile: compile the model with torch.compile.
    graphs: capture evaluations as CUDA graphs.
    batch: the maximum number of drafts per message.
    probe: memory of the leader, in which the worker replaces each byte x with 255 - x to prove that CUDA IPC works.
    nvtx: annotate the worker's work with NVTX ranges.
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
    """Load a model by name, for an emulated device or a GPU if one is given.

    digest: whether Loaded contains a digest of the weights' values, which takes about a second per gigabyte.
    """

    model: Name
    emulated: Emulated | None = None
    gpu: GpuConfig | None = None
    digest: bool = False


@dataclass(frozen=True)
class Loaded:
    """The model is loaded, in the dtype that Load requests.

    spec: what the model expects.
    nbytes: the number of bytes of the weights.
    layout: a digest of the names, dtypes, shapes, strides and offsets of the weights.
    probe_error: why the worker could not write to the probe; empty if it could, or if there was none.
    digest: a digest of the weights' values; empty unless Load requests it.
    """

    spec: ModelSpec
    nbytes: Bytes
    layout: Name
    probe_error: Annotated[str, Length(2000)] = ""
    digest: Name = ""


@dataclass(frozen=True)
class Share:
    """Use the weights in shared memory, of which exactly one of `memory` and `gpu` is not None.

    With `publish`, the worker first copies its own weights there.
    """

    memory: Handle | None
    publish: bool
    gpu: GpuHandle | None = None


@dataclass(frozen=True)
class Shared:
    """The worker uses the shared weights; or its own, and has opened no memory, if `error` says why."""

    error: Annotated[str, Length(2000)] = ""


@dataclass(frozen=True)
class WarmUp:
    """The weights are at their final addresses: move the remaining tensors to the GPU, compile, capture and warm up."""


@dataclass(frozen=True)
class WarmedUp:
    """The worker is ready for drafts."""


@dataclass(frozen=True)
class AsyncConfig:
    """Asynchronous dispatch of a run's drafts, see `drp.protocol.timeline`.

    completions: the offset of the completion records in the arena, three int64 for each row.
    timelines: the offset of the leader's semaphore, followed by those of the workers; see `TimelineSemaphore`.
    workers: the number of workers' semaphores, or of counters in `counters`.
    index: the index of this worker's semaphore or counter.
    acknowledge: whether the worker sends a Prediction once a draft is queued.
    counters: host memory with the workers' counters, for an arena on a GPU, where the leader records an event instead.
    wakeup: the pipe by which the worker notifies the leader on request.
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

    memory, gpu: the run's memory; exactly one is not None. Over TCP both are None, and the worker allocates the memory
        itself, see `drp.protocol.inline`.
    slots: the number of drafts, each of which has the tensors `inputs`.
    rows: the number of predictions, each of which has the tensors `outputs`. The offsets of inputs and outputs count
        from the beginning of the draft or prediction, see `arena.Arena`.
    cond: the conditions of every evaluation, at offsets in the whole memory.
    number: identifies host memory: equal numbers are the same memory, which need not be opened again; 0 for none.
    acknowledge: whether the worker answers with Bound. It need not if a draft follows, whose answer implies it.
    async_config: how drafts of the run are dispatched asynchronously; None if they are not.
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

    def has_same_memory(self, other: Bind) -> bool:
        """Whether another run has the same memory with the same layout."""
        mine = self.number, self.memory, self.gpu, self.slots, self.rows, self.inputs, self.outputs, self.cond
        its = other.number, other.memory, other.gpu, other.slots, other.rows, other.inputs, other.outputs, other.cond
        return mine == its and self.async_config == other.async_config


@dataclass(frozen=True)
class Bound:
    """The worker has mapped the run's memory, so its descriptor may be closed."""

    run: Count


@dataclass(frozen=True)
class BatchedDraft:
    """A further draft of a batch, with the fields of Draft."""

    index: Count
    timestep: Timestep
    slot: Count
    row: Count


@numbers
@dataclass(frozen=True)
class Draft:
    """Evaluate the draft in `slot` at `timestep`, and write the prediction to `row`.

    Two drafts that have not been answered never have the same row.

    index: the index in the grid.
    sequence: a unique number that marks the draft's completion record, if the draft is dispatched asynchronously. It is
        then answered once it is queued, or not at all, see `AsyncConfig.acknowledge`. 0 for synchronous drafts.
    after: the value of the leader's semaphore for which the evaluation waits; 0 where events have no values.
    batched: drafts to evaluate together with this one, as one batch in this order. There is one answer for all.
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
    """The predictions of a draft and of those batched with it are in their rows.

    For a draft with a sequence number it says only that the evaluation is queued, and `received` is its only time.

    seconds: the time of the evaluation. For a draft with a sequence number, the time of an earlier evaluation of the
        run whose completion record does not contain it, 0 if none is known.
    received, began, predicted, ended: when the draft was received, its evaluation began, the prediction was computed,
        and it was written to its row; in seconds of CLOCK_MONOTONIC, which all processes of a machine share.
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
    """The draft could not be evaluated: the denoiser raised or returned an invalid prediction. The worker continues.

    For a draft with a sequence number it may follow a Prediction.
    """

    run: Count
    index: Count
    row: Count
    error: Annotated[str, Length(2000)]
    traceback: Text


@dataclass(frozen=True)
class Unbind:
    """The run is over, and its memory will not be read again. With `keep`, a Rebind of this memory may follow."""

    run: Count
    keep: bool = False


@dataclass(frozen=True)
class Rebind:
    """A run begins whose Bind equals that of the kept run, except for `run` and `acknowledge`."""

    run: Count
    acknowledge: bool = True


@dataclass(frozen=True)
class Stop:
    """End the worker."""


@dataclass(frozen=True)
class Ping:
    """Answer with Pong. `sent` is when this was sent, in seconds of the leader's CLOCK_MONOTONIC."""

    sent: Seconds


@dataclass(frozen=True)
class Pong:
    """The answer to the Ping with this `sent`. `clock` is the worker's CLOCK_MONOTONIC, in seconds."""

    sent: Seconds
    clock: Seconds


@dataclass(frozen=True)
class Rejected:
    """The leader does not use this worker, or no longer, for this reason. The worker ends."""

    reason: Annotated[str, Length(2000)]


@dataclass(frozen=True)
class WorkerFailed:
    """The worker cannot continue. `activity` is what it was doing."""

    activity: Name
    error: Annotated[str, Length(2000)]
    traceback: Text


ToWorker = Load | Share | WarmUp | Bind | Rebind | Draft | Unbind | Stop | Ping | Rejected
ToLeader = Hello | Loaded | Shared | WarmedUp | Bound | Prediction | EvaluationError | WorkerFailed | Pong

TO_WORKER: dict[str, type[ToWorker]] = {kind.__name__: kind for kind in get_args(ToWorker)}
TO_LEADER: dict[str, type[ToLeader]] = {kind.__name__: kind for kind in get_args(ToLeader)}
