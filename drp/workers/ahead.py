"""Ahead: a worker answers a draft as soon as its evaluation is queued. Here the queue is a thread, on the host.

It stands in for a stream of a GPU, in order and asynchronous like one, so that everything around it runs anywhere.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from drp.protocol.arena import Arena
from drp.protocol.messages import Draft
from drp.protocol.order import LINE, RAISED, STAMP, HostLink, HostStream, Link, stamp, word


@dataclass(frozen=True)
class Work:
    """A draft, or a batch of them: the tensors given, and those to be written, of each."""

    draft: Draft
    arena: Arena
    inputs: Sequence[Mapping[str, Tensor]]
    outputs: Sequence[Mapping[str, Tensor]]

    @property
    def timesteps(self) -> list[float]:
        """One a draft."""
        return [self.draft.timestep, *(also.timestep for also in self.draft.also)]

    @property
    def rows(self) -> list[int]:
        """One a draft."""
        return [self.draft.row, *(also.row for also in self.draft.also)]


class Ahead(Protocol):
    """What a worker that answers ahead of its device asks of it."""

    @property
    def busy(self) -> bool:
        """Whether something that was queued is not done. Raises what makes it impossible to go on."""
        ...

    def bind(self, run: int, arena: Arena) -> None:
        """Take up a run's link and stamps."""
        ...

    def put(self, work: Work) -> None:
        """Queue an evaluation, and the stamp behind it; what is raised here is raised before anything was answered."""
        ...

    def unbind(self, run: int) -> None:
        """Let go of them."""
        ...

    def failed(self) -> list[tuple[Draft, Exception]]:
        """Return the drafts that were answered, and then could not be evaluated; each once."""
        ...

    def settle(self) -> None:
        """Wait for what was queued."""
        ...

    def close(self) -> None:
        """Queue no more."""
        ...


class Bound:
    """A run's link and stamps, as its Bind says."""

    def __init__(self, arena: Arena, link: Link) -> None:
        assert arena.bind.order is not None
        self.link = link
        self.stamps = arena.memory.tensor(arena.bind.order.stamps, (arena.bind.rows, STAMP), torch.int64)


def host_line(arena: Arena) -> Tensor:
    """Return the four numbers of a link on the host."""
    assert arena.bind.order is not None
    return arena.memory.tensor(arena.bind.order.link, (LINE // 8,), torch.int64)[:4]


class HostAhead:
    """A thread that evaluates what was answered, in order. `evaluate` does so, and returns the seconds that it took."""

    def __init__(self, evaluate: Callable[[Work], float]) -> None:
        self._evaluate = evaluate
        self._stream = HostStream("drp-worker")
        self._runs: dict[int, Bound] = {}
        self._failed: deque[tuple[Draft, Exception]] = deque()

    @property
    def busy(self) -> bool:
        """Whether something was given that is not done."""
        return not self._stream.passed(self._stream.mark()) or bool(self._failed)

    def bind(self, run: int, arena: Arena) -> None:
        """Take up a run's link and stamps."""
        self._runs[run] = Bound(arena, HostLink(host_line(arena), leads=False, stream=self._stream))

    def unbind(self, run: int) -> None:
        """Let go of them."""
        self._runs.pop(run, None)

    def failed(self) -> list[tuple[Draft, Exception]]:
        """Return what could not be evaluated, each draft once."""
        return [self._failed.popleft() for _ in range(len(self._failed))]

    def settle(self) -> None:
        """Wait for the thread."""
        self._stream.settle()

    def close(self) -> None:
        """End the thread."""
        self._stream.close()

    def put(self, work: Work) -> None:
        """Have the thread evaluate a draft and stamp it, once the leader has written it."""
        bound = self._runs[work.draft.run]
        bound.link.wait()
        self._stream.put(functools.partial(self._do, bound, work))
        bound.link.record()

    def _do(self, bound: Bound, work: Work) -> None:
        draft = work.draft
        try:
            seconds = self._evaluate(work)
        except Exception as error:  # the denoiser's: the stamp says that there is none, and a Fault says why
            self._failed.append((draft, error))
            for row in work.rows:
                bound.stamps[row, 0] = word(draft.sequence, RAISED)
            return
        for place, (row, output) in enumerate(zip(work.rows, work.outputs, strict=True)):
            took = round(seconds * 1e9) if place == 0 else 0  # a batch's, once
            stamp(bound.stamps[row], draft.sequence, output.values(), took)
