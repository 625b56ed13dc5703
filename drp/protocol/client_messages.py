"""The client protocol: every message between a client and a server, in the order of a session.

client -> server   Open      I speak this version
server -> client   Welcome   what is served, and the limits
client -> server   Submit    one sampling run
server -> client   Accepted  it will be run
server -> client   Refused   it will not: why
server -> client   Progress  so far it has come
server -> client   Finished  the samples
client -> server   Ack       the samples' shared memory is mapped, and may be given back
client -> server   Cancel    the run is not wanted any more
server -> client   Ended     it ended without samples: why
client -> server   Query     for the status, or for the metrics
server -> client   Status    how the server is
server -> client   Metrics   its metrics, in the text format of Prometheus
server -> client   Heartbeat  nothing new: I am there

A message is the first frame; the frames after it are the tensors that it names. See SPEC.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from drp.protocol.codec import Bounds, Length
from drp.protocol.handles import Count, Handle, Name
from drp.protocol.messages import ModelSpec, Seconds, Shape, Text

VERSION = 3

MAX_FRAMES = 62
"""Tensors of one message: a Submit has at most 60 conditions, noise and an image."""
MAX_FRAME_NBYTES = 1 << 28
"""Bytes of the longest frame, and so of a tensor that travels in one."""

HEARTBEAT_INTERVAL = 1.0
"""Seconds after which a client that has requests hears something, a Beat if there is nothing else."""
SILENCE_TIMEOUT = 10.0
"""Seconds of silence after which a client that waits for an answer may give the server up."""
ACK_TIMEOUT = 30.0
"""Seconds that a client has to map the shared memory of its samples."""

MAX_INCIDENTS = 64
MAX_INCIDENT_LENGTH = 2000
"""Characters. With 64 of these, in four bytes each, the longest Finished still is a message of a mebibyte at most."""

Total = Annotated[int, Bounds(0, 2**63 - 1)]
Whole = Annotated[int, Bounds(-(2**63), 2**63 - 1)]
Real = Annotated[float, Bounds(-1e308, 1e308)]
Positive = Annotated[float, Bounds(0, 1e308)]
Steps = Annotated[int, Bounds(0, 10_000)]
Reals = Annotated[tuple[Real, ...], Length(10_000)]
Counts = Annotated[tuple[Count, ...], Length(10_000)]
Labels = Annotated[tuple[Whole, ...], Length(100_000)]
Incidents = Annotated[tuple[Annotated[str, Length(MAX_INCIDENT_LENGTH)], ...], Length(MAX_INCIDENTS)]


@dataclass(frozen=True)
class TensorData:
    """A tensor's numbers, little-endian, in C order: those of a frame of this message, or those in shared memory."""

    dtype: Name
    shape: Shape
    frame: Annotated[int, Bounds(1, MAX_FRAMES)] | None = None
    memory: Handle | None = None


@dataclass(frozen=True)
class Condition:
    """A tensor for the denoiser."""

    name: Name
    tensor: TensorData


@dataclass(frozen=True)
class Option:
    """One option of a solver or a grid. Whole numbers and others are different: an order is 2, not 2.0."""

    name: Name
    value: Whole | Real | Name | bool | Reals


@dataclass(frozen=True)
class Rule:
    """How drafts are made, as `drp.sampling.drafts.DraftRule`."""

    carry: Real
    slope: Real
    axis: Name


@dataclass(frozen=True)
class Residual:
    """The residual at an index of the grid; None if it is not finite."""

    index: Count
    value: Positive | None


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the denoiser: which step's, by which worker, when, in seconds since the run began."""

    index: Count
    worker: Count
    began: Real
    ended: Real


Evaluations = Annotated[tuple[Evaluation, ...], Length(10_000)]


@dataclass(frozen=True)
class Open:
    """A client's first message; `name` is for people. Its fields are the same in every version."""

    version: Count
    name: Name


@dataclass(frozen=True)
class Welcome:
    """The session is open. `most` is how many requests the server has at once, `spec` what its model expects."""

    version: Count
    model: Name
    spec: ModelSpec
    devices: Annotated[tuple[Name, ...], Length(256)]
    max_requests: Count


@dataclass(frozen=True)
class Submit:
    """One run: the options of `drp.leader.request.Request`, and how the client wants to hear of it.

    `request` is the client's own number for it, which no other request of its session may have.
    """

    request: Count
    labels: Labels | None = None
    count: Count | None = None
    shape: Shape | None = None
    cond: Annotated[tuple[Condition, ...], Length(60)] = ()
    guidance: Real | None = None
    steps: Steps = 48
    solver: Name = "ddim"
    solver_options: Annotated[tuple[Option, ...], Length(64)] = ()
    grid: Annotated[tuple[Option, ...], Length(64)] = ()
    prediction_type: Name = "epsilon"
    noise: TensorData | None = None
    image: TensorData | None = None
    strength: Real = 1.0
    mode: Name = "window"
    drafts: Count | None = None
    target_speedup: Real | None = None
    target_rounds: Count | None = None
    stride: Real | None = None
    offsets: Name | Counts | None = None
    rule: Name | Rule | None = None
    tolerance: Real | None = 0.0025
    warmup: Count = 0
    sweeps: Count = 0
    seed: Total = 0
    residuals: bool = False
    progress: bool = False
    previews: Count = 0
    timeline: bool = False
    memory: bool = False


@dataclass(frozen=True)
class Accepted:
    """The request will be run; `ahead` are the unfinished requests that came before it."""

    request: Count
    ahead: Count


@dataclass(frozen=True)
class Refused:
    """What the client sent is not done. Its fields are the same in every version, and its codes are not.

    `request` is None where the refusal is of no Submit. `code` is "version", "protocol", "invalid", "busy" or
    "draining", and from a server of another version may be another word.
    """

    request: Count | None
    code: Name
    reason: Text


@dataclass(frozen=True)
class Progress:
    """The run has done `step` of `steps`; `preview` is its state there, if one is due."""

    request: Count
    step: Count
    steps: Count
    rounds: Count
    preview: TensorData | None = None
    evaluations: Evaluations = ()


@dataclass(frozen=True)
class Finished:
    """The samples, and the other fields of `drp.Result`; `waited` is from Submit to the run's beginning."""

    request: Count
    samples: TensorData
    mode: Name
    drafts: Count
    steps: Count
    devices: Annotated[tuple[Name, ...], Length(256)]
    rounds: Count
    evaluations: Count
    seconds: Seconds
    device_seconds: Seconds
    waited: Seconds
    residuals: Annotated[tuple[Residual, ...], Length(10_000)] = ()
    cuts: Counts = ()
    evaluated: Counts = ()
    incidents: Incidents = ()


@dataclass(frozen=True)
class Ack:
    """The shared memory of the samples is mapped."""

    request: Count


@dataclass(frozen=True)
class Cancel:
    """End the run; the answer is Ended, or Finished if it was over already."""

    request: Count


@dataclass(frozen=True)
class Ended:
    """The run ended without samples."""

    request: Count
    code: Literal["cancelled", "failed", "draining"]
    reason: Text


@dataclass(frozen=True)
class Query:
    """Ask for a Status or for Metrics."""

    what: Literal["status", "metrics"]


@dataclass(frozen=True)
class Status:
    """How the server is. `healthy`: it has no requests, or the last progress of any was not long ago."""

    state: Literal["serving", "draining", "lost"]
    healthy: bool
    reason: Text
    clients: Count
    requests: Count
    max_requests: Count
    uptime: Seconds
    since_progress: Seconds
    finished: Total
    cancelled: Total
    failed: Total
    refused: Total


@dataclass(frozen=True)
class Metrics:
    """Metrics in the text format of Prometheus."""

    text: Annotated[str, Length(200_000)]


@dataclass(frozen=True)
class Heartbeat:
    """The server is there, and so are the client's requests."""


ToServer = Open | Submit | Ack | Cancel | Query
ToClient = Welcome | Accepted | Refused | Progress | Finished | Ended | Status | Metrics | Heartbeat

TO_SERVER: dict[str, type[ToServer]] = {kind.__name__: kind for kind in (Open, Submit, Ack, Cancel, Query)}
TO_CLIENT: dict[str, type[ToClient]] = {
    kind.__name__: kind for kind in (Welcome, Accepted, Refused, Progress, Finished, Ended, Status, Metrics, Heartbeat)
}
