"""The worker's loop, which evaluates drafts and answers the leader's messages."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from drp.errors import ProtocolError
from drp.models import Denoiser, load
from drp.models.finite import check_finite
from drp.nvtx import annotate_methods
from drp.protocol.arena import Arena
from drp.protocol.memory import SharedMemory
from drp.protocol.messages import (
    BatchedDraft,
    Bind,
    Bound,
    Draft,
    EvaluationError,
    Hello,
    Load,
    Loaded,
    Prediction,
    Rebind,
    Share,
    Shared,
    Stop,
    ToLeader,
    ToWorker,
    Unbind,
    WarmedUp,
    WarmUp,
    WorkerFailed,
)
from drp.workers.async_executor import AsyncExecutor, HostExecutor, WorkItem
from drp.workers.cuda_errors import is_unrecoverable
from drp.workers.emulated import EmulatedDevice, EvaluationTimes, cheap
from drp.workers.prediction_cache import PredictionCache
from drp.workers.shared_memory_cache import SharedMemoryCache
from drp.workers.weights import Weights

if TYPE_CHECKING:
    from drp.workers.cuda_device import CudaDevice

RECEIVE_TIMEOUT = 1.0
"""Timeout of one wait for a message, in seconds."""
BUSY_RECEIVE_TIMEOUT = 0.05
"""The same while asynchronous work is being evaluated, whose failures must be reported."""
ANSWER_HOLD_TIME, ANSWER_SPIN_TIME = 0.01, 0.001
"""Seconds for which an answer to a Bind is held back, and for which this thread then polls instead of sleeping: the
run's first draft is about to arrive, and the answer makes the leader wake other workers."""


class Socket(Protocol):
    """The socket to the leader."""

    def send(self, message: ToLeader) -> None: ...

    def receive(self, seconds: float, awake: float = 0.0) -> ToWorker | None: ...

    def close(self) -> None: ...


class Worker:
    """Handles the leader's messages in a worker process, one after the other.

        message  action                                 answer
        Load     load the model                         Loaded
        Share    share or use the weights               Shared
        WarmUp   compile, capture and warm up (GPU)     WarmedUp
        Bind     open a run's memory                    Bound, if the message asks for it
        Rebind   use the retained memory for a new run  Bound, if the message asks for it
        Draft    evaluate, or queue if asynchronous     Prediction or EvaluationError; if asynchronous, a Prediction
                                                        only where the Bind asks for it
        Unbind   close a run's memory, or retain it     none
        Stop     end                                    none

    An error of an evaluation is answered; any other error is reported with WorkerFailed and ends the worker.

    beat: called about once a second, and before each message, to show that the main thread is alive.
    """

    def __init__(self, socket: Socket, hello: Hello, threads: int, beat: Callable[[], None] = lambda: None) -> None:
        torch.set_num_threads(threads)
        self._socket, self._hello, self._beat = socket, hello, beat
        self._denoiser: Denoiser | None = None
        self._weights = Weights(None)
        self._arenas: dict[int, Arena] = {}
        self._memory_cache = SharedMemoryCache()
        self._retained: tuple[Arena, Any] | None = None
        self._timed = _timed
        self._device: CudaDevice | None = None
        self._executor: AsyncExecutor | None = None

    def run(self) -> BaseException | None:
        """Handle messages until Stop. An error is reported to the leader, returned, and ends the worker."""
        self._socket.send(self._hello)
        message: ToWorker | None = None
        answers: list[ToLeader] = []
        try:
            while not isinstance(message := self._receive(bool(answers)), Stop):
                answer = self._answer(message) if message is not None else None
                if answer is not None:
                    answers.append(answer)
                if isinstance(message, Bind | Rebind) and self._arenas[message.run].bind.async_config is not None:
                    continue  # Queue a draft that has arrived or is about to arrive before answering.
                for answer in answers:
                    self._socket.send(answer)
                answers.clear()
                for draft, error in self._executor.take_failures() if self._executor is not None else ():
                    self._socket.send(self._evaluation_error(draft, error))
        except BaseException as error:  # Including SystemExit: a model's factory may parse arguments.
            self._socket.send(WorkerFailed(_activity(message), *_describe(error)))
            return error
        else:
            return None
        finally:
            if self._executor is not None:
                self._executor.close()
            self._socket.close()

    def _receive(self, holds: bool) -> ToWorker | None:
        """Return the next message, or None at the timeout."""
        self._beat()
        if holds:
            return self._socket.receive(ANSWER_HOLD_TIME, ANSWER_SPIN_TIME)
        return self._socket.receive(
            BUSY_RECEIVE_TIMEOUT if self._executor is not None and self._executor.busy else RECEIVE_TIMEOUT
        )

    def _answer(self, message: ToWorker) -> ToLeader | None:
        match message:
            case Draft():
                return self._evaluate(message)
            case Bind():
                self._bind(message)
                return Bound(message.run) if message.acknowledge else None
            case Rebind():
                self._rebind(message.run)
                return Bound(message.run) if message.acknowledge else None
            case Unbind():
                self._unbind(message)
            case Load():
                return self._load(message)
            case Share():
                return self._share(message)
            case WarmUp() if self._device is not None and self._denoiser is not None:
                self._denoiser = self._device.warm(self._denoiser)
                return WarmedUp()
        return None

    def _load(self, how: Load) -> Loaded:
        """Load the model in the dtype in which it will run. Its weights may be moved later."""
        unreached = ""
        if how.gpu is not None:
            from drp.workers.cuda_device import CudaDevice  # Imported here, so that CUDA is not used without a GPU.

            self._device = CudaDevice(how.gpu)  # Before loading the model, so that "cuda" in its factory is this GPU.
            if how.gpu.nvtx:
                annotate_methods(self, _receive="drp receive", _evaluate="drp evaluate")
                annotate_methods(self._socket, send="drp answer")
            unreached = self._device.answer_probe()
        self._denoiser = load(how.model)
        if self._hello.host and hasattr(self._denoiser.predict, "use_pretrained"):  # It shares no memory.
            self._denoiser.predict.use_pretrained()
        if self._device is not None:
            self._denoiser = self._device.in_dtype(self._denoiser)
        if how.emulated is not None:
            self._timed = EmulatedDevice(how.emulated).run
            if how.emulated.values == "cheap":
                self._denoiser = replace(self._denoiser, predict=cheap)
        self._weights = Weights(self._denoiser.module)
        if how.emulated is not None and how.emulated.values == "recorded":
            self._denoiser = replace(self._denoiser, predict=PredictionCache(self._denoiser.predict))
        digest = self._weights.digest() if how.digest else ""
        return Loaded(self._denoiser.spec, self._weights.nbytes, self._weights.layout, unreached, digest)

    def _share(self, share: Share) -> Shared:
        """Use the weights in the leader's memory, after copying this worker's weights there if it is to publish."""
        if self._device is not None and share.gpu is not None and share.memory is None:
            return Shared(self._device.share(self._weights, share.gpu, share.publish))
        if share.memory is None or share.gpu is not None:
            raise ProtocolError("weights lie either in shared memory or, for a worker on one, in a GPU's")
        if share.publish:
            memory = SharedMemory.open(share.memory)
            self._weights.share(memory, publish=True)
            memory.close()
        memory = SharedMemory.open(share.memory, private=True)  # Copy-on-write: an evaluation may write to weights.
        self._weights.share(memory, publish=False)
        memory.close()
        assert self._denoiser is not None
        self._denoiser.state.capture()
        return Shared()

    def _bind(self, bind: Bind) -> None:
        arena = Arena.open(bind, self._device.open_ipc if self._device is not None else None, self._memory_cache.open)
        if self._device is not None:
            self._device.bind(bind.run, arena)
        if bind.async_config is not None:
            if self._executor is None:
                self._executor = self._make_executor()
            self._executor.bind(bind.run, arena)
        self._arenas[bind.run] = arena

    def _rebind(self, run: int) -> None:
        """Use the retained memory, which is on the host, for a new run."""
        if self._retained is None or self._device is not None:
            raise ProtocolError(f"run {run} is to begin again with what was kept, and there is nothing")
        arena, bound = self._retained
        if self._executor is not None and bound is not None:
            self._executor.rebind(run, bound)
        self._arenas[run] = arena
        self._retained = None

    def _unbind(self, unbind: Unbind) -> None:
        """Close a run's memory, or retain it for the next run."""
        if self._device is not None:
            self._device.unbind(unbind.run)
        bound = self._executor.unbind(unbind.run) if self._executor is not None else None
        arena = self._arenas.pop(unbind.run, None)
        if unbind.keep and arena is not None:
            self._retained = arena, bound

    def _make_executor(self) -> AsyncExecutor:
        if self._device is None:
            return HostExecutor(self._compute)
        from drp.workers.cuda_executor import CudaExecutor  # Imported here, so that CUDA is not used without a GPU.

        assert self._denoiser is not None
        return CudaExecutor(self._device, self._denoiser)

    def _evaluate(self, draft: Draft) -> Prediction | EvaluationError | None:
        received = time.perf_counter()
        work = self._work(draft)
        if draft.sequence and (self._executor is None or work.arena.bind.async_config is None):
            raise ProtocolError(f"draft {draft.sequence} is asynchronous, and the Bind of run {draft.run} is not")
        try:
            if draft.sequence:
                assert self._executor is not None
                assert work.arena.bind.async_config is not None
                seconds = self._executor.submit(work)
                acknowledge = work.arena.bind.async_config.acknowledge
                return Prediction(draft.run, draft.index, draft.row, seconds, received) if acknowledge else None
            if self._executor is not None:
                self._executor.synchronize()
            with torch.inference_mode():
                began, predicted, ended, _ = self._compute(work)
        except BaseException as error:  # The denoiser may raise anything, including SystemExit and KeyboardInterrupt.
            return self._evaluation_error(draft, error)
        return Prediction(draft.run, draft.index, draft.row, ended - began, received, began, predicted, ended)

    def _work(self, draft: Draft) -> WorkItem:
        arena = self._arenas.get(draft.run)
        if arena is None:
            raise ProtocolError(f"a draft of run {draft.run}, which is not bound")
        drafts: tuple[Draft | BatchedDraft, ...] = (draft, *draft.batched)
        for each in drafts:
            if each.slot >= arena.bind.slots or each.row >= arena.bind.rows:
                raise ProtocolError(
                    f"slot {each.slot} and row {each.row}; the run has {arena.bind.slots} and {arena.bind.rows}"
                )
        inputs = [arena.draft(each.slot) for each in drafts]
        return WorkItem(draft, arena, inputs, [arena.prediction(each.row) for each in drafts])

    def _compute(self, work: WorkItem, since: float | None = None) -> EvaluationTimes:
        """Evaluate a batch of drafts and return its times.

        `since` is when the evaluation of queued work could have begun, None for synchronous work.
        """

        def evaluate() -> float:
            assert self._denoiser is not None
            if self._device is not None:
                return self._device.evaluate(self._denoiser, work.arena, work.inputs, work.timesteps, work.outputs)
            predicted = self._denoiser.evaluate_batch(work.inputs, work.timesteps, work.arena.cond, work.outputs)
            for given, made in zip(work.inputs, work.outputs, strict=True):
                check_finite(made, given)
            return predicted

        nbytes = sum(tensor.nbytes for each in work.inputs for tensor in each.values())
        return self._timed(work.draft, nbytes, evaluate, since)

    def _evaluation_error(self, draft: Draft, error: BaseException) -> EvaluationError:
        """Return the message that a draft failed; raise the error, which ends the worker, if it is unrecoverable."""
        if is_unrecoverable(error) or (self._device is not None and self._device.is_context_lost):
            raise error
        return EvaluationError(draft.run, draft.index, draft.row, *_describe(error))


def _timed(draft: Draft, nbytes: int, evaluate: Callable[[], float], since: float | None) -> EvaluationTimes:
    began = time.perf_counter()
    predicted, ended = evaluate(), time.perf_counter()
    return EvaluationTimes(began, predicted, ended, ended)


def _describe(error: BaseException) -> tuple[str, str]:
    """Return an error's type and text, and its traceback, truncated and encoded for a message."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:  # The error's __str__ is user code.
        text = f"{type(error).__name__}, whose text cannot be made"
    return _printable(text)[:2000], _printable("".join(traceback.format_exception(error)))[-20_000:]


def _printable(text: str) -> str:
    """Return the text with lone surrogates escaped, which occur in undecodable file names."""
    return text.encode(errors="backslashreplace").decode()


def _activity(message: ToWorker | None) -> str:
    match message:
        case Draft():
            return f"evaluating step {message.index} of run {message.run}"
        case Load():
            return f"loading model {message.model!r}"[:200]
        case WarmUp():
            return "compiling, capturing or warming its model"
        case None:
            return "waiting"
        case _:
            return f"handling {type(message).__name__}"
