"""Work: one request for images under way, whatever makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class ImageRequest:
    """What was asked for: `n` images of a prompt. `previews` is how many unfinished ones of the first are wanted.

    `options` are those of a run, by the names of `drp.leader.request.Request`, as far as they were given.
    """

    prompt: str
    n: int = 1
    size: str | None = None
    previews: int = 0
    timeline: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProgressEvent:
    """How far a request is; `preview` makes a PNG of its state; `facts` are what a program may want to know besides."""

    step: int
    steps: int
    preview: Callable[[], bytes] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


Report = Callable[[ProgressEvent], None]
"""Called in any thread, and must return at once."""


@dataclass(frozen=True)
class Images:
    """PNGs, and what it took to make them."""

    pngs: list[bytes]
    facts: Mapping[str, Any]


class ImageJob(Protocol):
    """A request under way."""

    images: Future[Images]

    def cancel(self) -> None:
        """End it: nobody wants the images any more."""
        ...


class Backend(Protocol):
    """What makes images. Its methods are called in several threads."""

    model: str

    def begin(self, request: ImageRequest, report: Report | None = None) -> ImageJob:
        """Begin at once; raise ValueError, naming value and remedy, for what cannot be.

        `report` is called with each step that is done, until the images are there; without it there are no previews.
        """
        ...

    def health(self) -> tuple[bool, Mapping[str, Any]]:
        """Return whether all is well, and what a person wants to know of it."""
        ...

    def metrics(self) -> str:
        """Return metrics in the text format of Prometheus."""
        ...

    def close(self) -> None:
        """Cancel what is under way, and end."""
        ...


class Previews:
    """When `count` previews are due: spread evenly over the steps between the first and the last."""

    def __init__(self, count: int) -> None:
        self._count, self._shown = count, 0

    def is_due(self, step: int, steps: int) -> bool:
        """Return whether to show the state after `step` of `steps`; it counts as shown then."""
        due = self._shown < self._count and step < steps and step * (self._count + 1) >= (self._shown + 1) * steps
        self._shown += due
        return due


def check_work(images: int, width: int, height: int, steps: int, most: float) -> None:
    """Raise ValueError for a request that is more work than one may be, in pixels times steps."""
    if images * width * height * steps > most:
        raise ValueError(
            f"{images} image(s) of {width}x{height} in {steps} steps are {images * width * height * steps:.3g} pixel "
            f"steps, and one request may have {most:.3g}; ask for fewer or smaller images, or fewer steps"
        )
