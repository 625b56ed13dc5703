"""Pool: starts the workers, passes messages to and fro, notices when one is lost, ends them."""

from __future__ import annotations

import dataclasses
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import zmq

from drp.leader.devices import Device
from drp.leader.errors import WorkerError
from drp.leader.process import Process, find_interpreter
from drp.protocol.codec import ProtocolError
from drp.protocol.memory import SharedMemory
from drp.protocol.messages import (
    VERSION,
    Failed,
    Hello,
    Load,
    Loaded,
    ModelSpec,
    Share,
    Shared,
    Stop,
    ToLeader,
    ToWorker,
)
from drp.protocol.transport import LeaderSocket

ENTRY = "drp.workers.entry"
LAST_WORDS = 16 * 1024
GRACE = 2.0
"""Seconds that a worker has to end after Stop, before it is killed."""

log = logging.getLogger(__name__)
Answer = TypeVar("Answer", bound=ToLeader)


@dataclass(frozen=True)
class WorkerProcess:
    """One worker as the leader sees it; `identity` is its address on the leader's socket."""

    number: int
    identity: bytes
    device: Device
    process: Process
    words: SharedMemory

    def __str__(self) -> str:
        return f"worker {self.number} ({self.device.name}, process {self.process.pid})"

    def end(self) -> str:
        """Say how a dead worker ended: exit code or signal, and its last words."""
        deadline = time.monotonic() + 1.0
        self.process.join(1.0)
        while (code := self.process.exitcode) is None and time.monotonic() < deadline:
            time.sleep(0.01)  # Another thread has just asked for the code, and is about to write it down.
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        words = self.words.read().rstrip(b"\0").decode(errors="replace").strip()
        return f"{how}; " + (f"its last words:\n{words}" if words else "it left no last words")


class Pool:
    """The worker processes of one leader, started and with the model loaded; `close` ends them."""

    def __init__(
        self,
        model: str,
        devices: Sequence[Device],
        threads: int,
        start_timeout: float,
        python: str | os.PathLike[str] | None = None,
    ) -> None:
        _refuse_inside_import()
        self.owner = os.getpid()
        self._python = find_interpreter(python)
        self._main = _main_script() if model.startswith("__main__:") else None
        self.workers: list[WorkerProcess] = []
        self._weights: SharedMemory | None = None
        self._socket = LeaderSocket()
        try:
            for number, device in enumerate(devices):
                self._spawn(number, device, threads)
            self.spec = self._start(model, start_timeout)
        except BaseException:
            self.close(grace=0.0)
            raise

    def _spawn(self, number: int, device: Device, threads: int) -> None:
        entry = importlib.import_module(ENTRY)
        identity = b"worker-%d" % number
        words = SharedMemory.create(LAST_WORDS)
        config = entry.Config(
            identity=identity.decode(),
            endpoint=self._socket.endpoint,
            directory=str(self._socket.directory),
            leader=os.getpid(),
            from_main_thread=threading.get_native_id() == os.getpid(),
            last_words=f"/proc/{os.getpid()}/fd/{words.handle.fd}",
            cores=device.cores,
            threads=threads,
            version=sys.version_info[:2],
            main=self._main,
        )
        try:
            process = Process(self._python, ENTRY, dataclasses.asdict(config))
        except BaseException:
            words.close()
            raise
        self.workers.append(WorkerProcess(number, identity, device, process, words))
        self._socket.watch(process.sentinel)  # before its first word: a worker that dies unheard is noticed

    def _start(self, model: str, timeout: float) -> ModelSpec:
        """Bring all workers to the point where they take drafts; return what the model expects."""
        deadline = time.monotonic() + timeout
        waiting = f"start within {timeout:g} s (start_timeout)"
        for worker, hello in self._gather(Hello, self.workers, deadline, waiting):
            if hello.version != VERSION:
                raise WorkerError(f"{worker} speaks version {hello.version} of the protocol, the leader {VERSION}")
        self._socket.vanish()
        for worker in self.workers:
            self.send(worker, Load(model, worker.device.emulated))
        loaded = self._gather(Loaded, self.workers, deadline, f"load {model!r} and {waiting}")
        (first, facts), *others = loaded
        for worker, other in others:
            if other.layout != facts.layout:
                raise WorkerError(f"{worker} made other weights of {model!r} than {first}; its factory must not vary")
        self._weights = SharedMemory.create(facts.nbytes)
        for publish, group in ((True, self.workers[:1]), (False, self.workers[1:])):
            for worker in group:
                self.send(worker, Share(self._weights.handle, publish))
            self._gather(Shared, group, deadline, f"share its weights and {waiting}")
        return facts.spec

    def _gather(
        self, kind: type[Answer], workers: Sequence[WorkerProcess], deadline: float, waiting: str
    ) -> list[tuple[WorkerProcess, Answer]]:
        """Return one answer of a kind from each worker, in the workers' order."""
        answers: dict[int, Answer] = {}
        while len(answers) < len(workers):
            silent = next(w for w in workers if w.number not in answers)
            worker, message = self._receive(deadline, f"{silent} did not {waiting}")
            if not isinstance(message, kind):
                raise WorkerError(f"{worker} sent {type(message).__name__} where {kind.__name__} was due")
            answers[worker.number] = message
        return [(worker, answers[worker.number]) for worker in workers]

    def send(self, worker: WorkerProcess, message: ToWorker) -> None:
        """Send a message; raise WorkerError if the worker is gone."""
        try:
            self._socket.send(worker.identity, message)
        except zmq.ZMQError as error:
            if worker.process.is_alive():
                raise WorkerError(f"{worker} does not take its messages: {error}") from None
            raise WorkerError(f"{worker} {worker.end()}") from None

    def watch(self, fd: int) -> None:
        """Let `poll` also return when a descriptor of the caller's is ready."""
        self._socket.watch(fd)

    def poll(self, deadline: float, wakeup: int | None = None) -> tuple[WorkerProcess, ToLeader] | None:
        """Return the next message, or None at the deadline, or when `wakeup`, an eventfd, is ready; that is reset.

        Raises WorkerError if a worker has failed or died; what it sent before it died comes first.
        """
        has_message, ready = self._socket.poll(deadline - time.monotonic())
        if wakeup in ready:
            os.eventfd_read(wakeup)
        if has_message:
            return self._open()
        for worker in self.workers:
            if worker.process.sentinel in ready:
                raise WorkerError(f"{worker} {worker.end()}")
        return None

    def wait(self, seconds: float) -> None:
        """Leave the processor to others for so long, or until something is there to be taken."""
        self._socket.wait(seconds)

    def receive_now(self) -> tuple[WorkerProcess, ToLeader] | None:
        """Return a message that is waiting, or None."""
        try:
            return self._open()
        except zmq.Again:
            return None

    def _receive(self, deadline: float, late: str) -> tuple[WorkerProcess, ToLeader]:
        """Return the next message; raise WorkerError, saying `late`, at the deadline."""
        while (got := self.poll(deadline)) is None:
            if time.monotonic() >= deadline:
                raise WorkerError(late)
        return got

    def _open(self) -> tuple[WorkerProcess, ToLeader]:
        try:
            identity, message = self._socket.receive()
        except ProtocolError as error:
            raise WorkerError(f"a worker sent what is no message: {error}") from error
        worker = next(w for w in self.workers if w.identity == identity)
        if isinstance(message, Failed):
            raise WorkerError(f"{worker} failed {message.doing}: {message.error}\n{message.traceback}")
        return worker, message

    def close(self, grace: float = GRACE) -> None:
        """End all workers, by Stop and then, after `grace` seconds, by SIGKILL; give back all memory and sockets."""
        if os.getpid() != self.owner:
            return  # A forked child holds copies of what is its parent's to end.
        workers, self.workers = self.workers, []
        if grace > 0:
            for worker in workers:
                try:
                    self._socket.send(worker.identity, Stop())
                except zmq.ZMQError:
                    log.debug("%s is gone already", worker)
        deadline = time.monotonic() + grace
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        for worker in workers:
            if worker.process.is_alive():
                worker.process.kill()
        for worker in workers:
            worker.process.join(5.0)
            if not worker.process.is_alive():
                worker.process.close()
            worker.words.close()
        self._socket.close()
        if self._weights is not None:
            self._weights.close()


def _main_script() -> str:
    """Return the path of the main script, for a model that is made there."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is None or not Path(path).is_file():
        raise ValueError(
            "the model is made in __main__, which no worker can import: it has no file; put it in a module"
        )
    return str(Path(path).absolute())


def _refuse_inside_import() -> None:
    """Workers import the main script if the model is made there; unguarded, it would start leaders in them."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "this script starts drp while it is being imported by a worker; put what it does under "
            "if __name__ == '__main__':"
        )
