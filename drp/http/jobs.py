"""The interface between the HTTP application and its backends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

RUN_FACTS: Final = ("mode", "drafts", "steps", "devices", "rounds", "evaluations", "seconds", "theory", "speedup")
"""The facts about a run that are returned with its images, by their names in a result."""


@dataclass(frozen=True)
class ImageRequest:
    """A request for `n` images of a prompt, with `previews` unfinished versions of the first.

    options: the given options of the run, by the names of `drp.leader.request.Request`.
    """

    prompt: str
    n: int = 1
    size: str | None = None
    previews: int = 0
    timeline: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProgressEvent:
    """The progress of a request. `preview` returns a PNG of its state; `facts` are further fields for the client."""

    step: int
    steps: int
    preview: Callable[[], bytes] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


Report = Callable[[ProgressEvent], None]
"""Called in any thread; it must return immediately."""


@dataclass(frozen=True)
class Images:
    """PNGs, and facts about the run: its mode, rounds, time and so on."""

    pngs: list[bytes]
    facts: Mapping[str, Any]


class ImageJob(Protocol):
    """A submitted request."""

    images: Future[Images]

    def cancel(self) -> None:
        """Cancel the request, or do nothing if it has ended."""
        ...


class Backend(Protocol):
    """A source of images. Its methods are thread-safe."""

    model: str

    def begin(self, request: ImageRequest, report: Report | None = None) -> ImageJob:
        """Submit a request and return immediately; raise ValueError for an invalid one.

        `report` is called after each step until the images are finished. Without it there are no previews.
        """
        ...

    def health(self) -> tuple[bool, Mapping[str, Any]]:
        """Return whether the backend is healthy, and facts about its state."""
        ...

    def metrics(self) -> str:
        """Return metrics in the text format of Prometheus."""
        ...

    def close(self) -> None:
        """Cancel the current requests and end."""
        ...


class Previews:
    """Decides when `count` previews are due: they are spread evenly over the steps."""

    def __init__(self, count: int) -> None:
        self._count, self._shown = count, 0

    def is_due(self, step: int, steps: int) -> bool:
        """Return whether a preview is due after `step` of `steps`, and count it if so."""
        due = self._shown < self._count and step < steps and step * (self._count + 1) >= (self._shown + 1) * steps
        self._shown += due
        return due


def check_work(images: int, width: int, height: int, steps: int, limit: float) -> None:
    """Raise ValueError for a request of more than `limit` pixels times steps."""
    if images * width * height * steps > limit:
        raise ValueError(
            f"{images} image(s) of {width}x{height} in {steps} steps are {images * width * height * steps:.3g} pixel "
            f"steps, and one request may have {limit:.3g}; ask for fewer or smaller images, or fewer steps"
        )
