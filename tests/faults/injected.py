"""A denoiser whose worker meets with a fault at a chosen moment: real signals, sent by the worker to itself.

The environment variable DRP_TEST_FAULT says which, as JSON: {"where": ..., "how": ..., "who": [worker numbers]}. Only
workers of the first generation meet with it, each once; those that replace them do not.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from drp.protocol.messages import Bind, Draft, EvaluationError, Prediction, Stop, Unbind
from drp.protocol.transport import WorkerSocket
from drp.workers import weights
from drp.workers.worker import Worker

WHERE = ("loading", "sharing", "binding", "before", "during", "after", "answered", "unbinding", "closing")
AT_STEP = 5


def fault() -> dict[str, Any]:
    """Return what is to happen to this worker, nothing if nothing is."""
    told: dict[str, Any] = json.loads(os.environ.get("DRP_TEST_FAULT", "{}"))
    name = multiprocessing.current_process().name
    if not told or not name.startswith("worker-"):
        return {}
    _, number, generation = name.split("-")
    return told if int(generation) == 0 and int(number) in told["who"] else {}


def strike() -> None:
    """Meet with it, if it is still to come."""
    how = os.environ.pop("DRP_TEST_FAULT", None) and HAPPENS["how"]
    if how == "exit":
        os._exit(9)
    if how:
        signal.raise_signal(getattr(signal, str(how)))


HAPPENS: dict[str, Any] = {}


def predict(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Any shape: enough arithmetic that other inputs would show, and a little time."""
    time.sleep(0.005)
    if HAPPENS.get("where") == "during" and t[0] < 1000 - 20 * AT_STEP:
        strike()
    return torch.sin(3 * x) * (0.3 + t / 2000).view(-1, *[1] * (x.dim() - 1))


def make() -> Callable[..., Tensor]:
    """Return the denoiser, this process prepared for what is to happen to it."""
    HAPPENS.update(fault())
    if HAPPENS.get("where") == "loading":
        strike()
    if HAPPENS:
        _prepare(HAPPENS["where"])
    return predict


def _prepare(where: str) -> None:
    """Let the fault strike between two lines of the worker, where no signal from outside could be aimed."""
    receive, evaluate = Worker._receive, Worker._evaluate
    send, share = WorkerSocket.send, weights.Weights.share

    @functools.wraps(receive)
    def on_receive(self: Worker, holds: bool) -> Any:
        message = receive(self, holds)
        at = {"binding": Bind, "before": Draft, "unbinding": Unbind, "closing": Stop}.get(where)
        if at is not None and isinstance(message, at) and getattr(message, "index", AT_STEP) >= AT_STEP:
            strike()
        return message

    @functools.wraps(evaluate)
    def on_evaluate(self: Worker, draft: Draft) -> Prediction | EvaluationError | None:
        answer = evaluate(self, draft)
        if answer is None and draft.index >= AT_STEP and where in ("after", "answered"):  # It is queued.
            time.sleep(0.0 if where == "after" else 0.01)
            strike()
        return answer

    @functools.wraps(send)
    def on_send(self: WorkerSocket, message: Any) -> None:
        due = isinstance(message, Prediction) and message.index >= AT_STEP
        if due and where == "after":
            strike()
        send(self, message)
        if due and where == "answered":
            time.sleep(0.01)  # until it is on its way
            strike()

    @functools.wraps(share)
    def on_share(self: weights.Weights, *arguments: Any, **named: Any) -> None:
        if where == "sharing":
            strike()
        share(self, *arguments, **named)

    Worker._receive = on_receive  # type: ignore[method-assign]  # the worker's own code, in the worker's own process
    Worker._evaluate = on_evaluate  # type: ignore[method-assign]  # likewise
    WorkerSocket.send = on_send  # type: ignore[method-assign]  # likewise
    weights.Weights.share = on_share  # type: ignore[method-assign]  # likewise
