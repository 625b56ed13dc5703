"""The client protocol: every message between a client and a server, in the order of a session.

client -> server   Open      the client's protocol version
server -> client   Welcome   what is served, and the limits
client -> server   Submit    one sampling run
server -> client   Accepted  it will be run
server -> client   Refused   it will not be run: why
server -> client   Progress  how many steps are done
server -> client   Finished  the samples
client -> server   Ack       the samples' shared memory is mapped, and may be freed
client -> server   Cancel    end the run
server -> client   Ended     it ended without samples: why
client -> server   Query     send the status, or the metrics
server -> client   Status    the server's state
server -> client   Metrics   its metrics, in the text format of Prometheus
server -> client   Heartbeat the server is alive, and has no news

A message is the first frame; the frames after it are the tensors that it names. See SPEC.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from drp.protocol.codec import Bounds, Length
from drp.protocol.handles import Count, Handle, Name
from drp.protocol.messages import ModelSpec, Seconds, Shape, Text

VERSION = 3

MAX_FRAMES = 62
"""The maximum number of tensors in a message: a Submit has at most 60 conditions, noise and an image."""
MAX_FRAME_NBYTES = 1 << 28
"""The maximum length of a frame in bytes, and so of a tensor that is sent in one."""

HEARTBEAT_INTERVAL = 1.0
"""Seconds after which the server sends a Heartbeat to a client with requests, unless it has sent something else."""
SILENCE_TIMEOUT = 10.0
"""Seconds without a message after which a client that waits for an answer may take the server for dead."""
ACK_TIMEOUT = 30.0
"""Seconds within which a client must map the shared memory of its samples."""

MAX_INCIDENTS = 64
MAX_INCIDENT_LENGTH = 2000
"""The maximum length in characters. The longest Finished, with 64 incidents in four bytes a character, stays below a
mebibyte."""

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
    """A tensor: little-endian numbers in C order, in a frame of this message or in shared memory."""

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
    """An option of a solver or a grid. Integers and floats differ: an order is 2, not 2.0."""

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
    """An evaluation of the denoiser: its step, its worker, and its begin and end in seconds since the run began."""

    index: Count
    worker: Count
    began: Real
    ended: Real


Evaluations = Annotated[tuple[Evaluation, ...], Length(10_000)]


@dataclass(frozen=True)
class Open:
    """A client's first message; `name` is for logs. Its fields are the same in every version."""

    version: Count
    name: Name


@dataclass(frozen=True)
class Welcome:
    """The session is open.

    max_requests: the number of requests that the server accepts at once.
    spec: what its model expects.
    """

    version: Count
    model: Name
    spec: ModelSpec
    devices: Annotated[tuple[Name, ...], Length(256)]
    max_requests: Count


@dataclass(frozen=True)
class Submit:
    """A sampling run: the options of `drp.leader.request.Request`, and which messages the client wants about it.

    request: a number that the client chooses; it must be unique in the session.
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
    """The request will be run; `ahead` is the number of unfinished requests that came before it."""

    request: Count
    ahead: Count


@dataclass(frozen=True)
class Refused:
    """The server rejects a message. Its fields are the same in every version; its codes may differ.

    request: the number of a rejected Submit, None for other messages.
    code: "version", "protocol", "invalid", "busy" or "draining"; a server of another version may have others.
    """

    request: Count | None
    code: Name
    reason: Text


@dataclass(frozen=True)
class Progress:
    """The run has done `step` of `steps`; `preview` is its state at this step, if the client has asked for it."""

    request: Count
    step: Count
    steps: Count
    rounds: Count
    preview: TensorData | None = None
    evaluations: Evaluations = ()


@dataclass(frozen=True)
class Finished:
    """The samples, and the other fields of `drp.Result`; `waited` are the seconds from Submit to the run's begin."""

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
    """The client has mapped the shared memory of the samples."""

    request: Count


@dataclass(frozen=True)
class Cancel:
    """End the run. The answer is Ended, or Finished if the run is finished already."""

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
    """The server's state. `healthy`: it has no requests, or one of them made progress recently."""

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
    """The server is alive, and still has the client's requests."""


ToServer = Open | Submit | Ack | Cancel | Query
ToClient = Welcome | Accepted | Refused | Progress | Finished | Ended | Status | Metrics | Heartbeat

TO_SERVER: dict[str, type[ToServer]] = {kind.__name__: kind for kind in get_args(ToServer)}
TO_CLIENT: dict[str, type[ToClient]] = {kind.__name__: kind for kind in get_args(ToClient)}
