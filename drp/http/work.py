"""Work: one order of images under way, whatever makes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Order:
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
class News:
    """How far an order is; `preview` is a PNG; `facts` are what a program may want to know besides."""

    step: int
    steps: int
    preview: bytes | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Images:
    """PNGs, and what it took to make them."""

    pngs: list[bytes]
    facts: Mapping[str, Any]


class Work(Protocol):
    """An order under way."""

    images: Future[Images]

    def news(self) -> Iterator[News]:
        """Yield what is new, until the images are there or it is known that they will not be. It blocks meanwhile."""
        ...

    def cancel(self) -> None:
        """End it: nobody wants the images any more."""
        ...


class Backend(Protocol):
    """What makes images. Its methods are called in several threads."""

    model: str

    def begin(self, order: Order) -> Work:
        """Begin an order at once; raise ValueError, naming value and remedy, for what cannot be."""
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
