"""The states of an asynchronous run that are computed, and depend on predictions that are not verified yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drp.protocol.timeline import Stream
from drp.sampling.residuals import residual


@dataclass(frozen=True)
class KeptState:
    """A state that is handed to the caller once the batches that it depends on are verified.

    k: the step.
    state: a copy of the state [B * D]; None if the caller wants no states.
    draft: a copy of the draft at this step, for its residual; None if no residuals are wanted.
    needs: the number of batches that must be verified first.
    event: the run's stream has computed the copies at this event; None without copies.
    """

    k: int
    state: Tensor | None
    draft: Tensor | None
    needs: int
    event: Any


class KeptStates:
    """The states that wait for batches to be verified, in order.

    wanted: whether the caller wants states or residuals; otherwise only the steps are counted.
    steps_done: the number of steps whose states were delivered.
    residuals: by index, the residuals of delivered states, if drafts were kept with them.
    """

    def __init__(self, stream: Stream, shape: torch.Size, wanted: bool) -> None:
        self._stream, self._shape, self.wanted = stream, shape, wanted
        self._states: deque[KeptState] = deque()
        self.steps_done = 0
        self.residuals: dict[int, float] = {}

    def keep(self, k: int, x: Tensor, draft: Tensor | None, needs: int) -> None:
        """Record a state that is being computed, and copy it if it is wanted: the next round may overwrite it."""
        if k > self.steps_done and self.wanted:
            state, kept_draft = self._copy(x.reshape(-1)), None if draft is None else self._copy(draft)
            self._states.append(KeptState(k, state, kept_draft, needs, self._stream.record()))
        else:
            self._states.append(KeptState(k, None, None, needs, None))

    def _copy(self, x: Tensor) -> Tensor:
        copy = torch.empty_like(x)
        self._stream.enqueue(copy.copy_, x)
        return copy

    def is_due(self, verified: int) -> bool:
        """Whether a state depends on the first `verified` batches only, so that it may be delivered."""
        return bool(self._states) and self._states[0].needs <= verified

    def deliver(self, verified: int, callback: Callable[[int, Tensor], None] | None) -> None:
        """Call `callback` for the states that depend on the first `verified` batches only and are computed."""
        while self._states and (step := self._states[0]).needs <= verified:
            if step.event is not None and not self._stream.query(step.event):
                return
            self._states.popleft()
            if step.k > self.steps_done:
                self.steps_done = step.k
                self._deliver_state(step, callback)

    def _deliver_state(self, step: KeptState, callback: Callable[[int, Tensor], None] | None) -> None:
        if step.state is None:
            return
        with self._stream.side_stream:  # The run's own stream may be waiting for workers.
            if step.state.is_cuda:
                step.state.record_stream(torch.cuda.current_stream())
            if step.draft is not None:
                self.residuals[step.k] = residual(step.state, step.draft, self._shape[0])
            if callback is not None:
                callback(step.k, step.state.view(self._shape))

    def discard(self, kept: int) -> None:
        """Discard the states that depend on more than the first `kept` batches."""
        self._states = deque(step for step in self._states if step.needs <= kept)
