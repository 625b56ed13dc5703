"""Workers that are processes of this machine: starting them, the socket to them, and detecting exits."""

from __future__ import annotations

import importlib
import itertools
import logging
import multiprocessing
import os
import signal
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import psutil
import zmq

from drp.errors import ProtocolError
from drp.leader.devices import Device
from drp.leader.supervision.dropped import DroppedMessages
from drp.leader.supervision.process import Process, find_interpreter
from drp.leader.supervision.worker import Encoded, Received
from drp.protocol.codec import decode, encode
from drp.protocol.memory import SharedMemory, require_openable
from drp.protocol.messages import TO_LEADER, Stop, ToWorker
from drp.protocol.transport import LeaderSocket

WORKER_MODULE = "drp.workers.entry"
CRASH_LOG_NBYTES = 16 * 1024
"""Bytes of the log that a worker writes when it crashes. The heartbeat, an unsigned 64-bit count, follows it."""
LAST_MESSAGE_TIMEOUT = 0.05
"""Seconds to wait for the last message of a worker whose process has exited by itself."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerProcess:
    """A worker process as the leader sees it. `identity` is its address on the leader's socket."""

    number: int
    identity: bytes
    device: Device
    process: Process
    crash_log: SharedMemory
    backend: LocalBackend = field(repr=False)
    shares_memory: ClassVar[bool] = True

    def __str__(self) -> str:
        return f"worker {self.number} ({self.device.name}, process {self.process.pid})"

    @property
    def pid(self) -> int | None:
        return self.process.pid

    @property
    def heartbeat(self) -> int:
        """The count of the main thread's loop iterations, at least one per `drp.workers.worker.RECEIVE_TIMEOUT`."""
        return int(struct.unpack_from("Q", self.crash_log.view(), CRASH_LOG_NBYTES)[0])

    @property
    def is_stopped(self) -> bool:
        """Whether the process is stopped, by SIGSTOP or by a debugger."""
        try:
            return psutil.Process(self.process.pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        except (psutil.Error, OSError, MemoryError):  # The process is gone, or there is no free descriptor.
            return False

    @property
    def exit_code(self) -> int | None:
        """The exit code, or minus the number of the signal that ended the process; None if it has not ended."""
        self.process.join(1.0)
        return self.process.exitcode

    def request_heartbeat(self) -> None:
        """Do nothing: the process counts by itself, in shared memory."""

    def encode(self, message: ToWorker) -> Encoded:
        return (encode(message),)

    def send(self, *messages: Encoded) -> None:
        """Send messages together. A worker whose queue is full is killed."""
        try:
            self.backend.socket.send(self.identity, *itertools.chain(*messages))
        except zmq.Again:
            log.warning("%s does not take its messages and is ended", self)
            self.process.kill()
        except zmq.ZMQError as error:
            log.debug("%s is gone: %s", self, error)

    def retire(self, why: str) -> tuple[str, int | None]:
        return self.backend.retire(self)

    def describe_exit(self, code: int | None) -> str:
        """Describe how a worker ended with this exit code, including its crash log."""
        ending = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        if code is None:
            ending = "was killed, and has not ended yet"
        log = self.crash_log.read()[:CRASH_LOG_NBYTES].rstrip(b"\0").decode(errors="replace").strip()
        return f"{ending}; " + (f"its crash log:\n{log}" if log else "its crash log is empty")


class LocalBackend:
    """The worker processes of one leader on its own machine; they end with the thread that has started them."""

    def __init__(self, model: str, threads: int, python: str | os.PathLike[str] | None = None) -> None:
        _refuse_inside_import()
        require_openable()
        self._python = find_interpreter(python)
        self._main = _main_script() if model.startswith("__main__:") else None
        self.workers: dict[int, WorkerProcess] = {}
        """By sentinel."""
        self._dropped = DroppedMessages(log)
        self._threads = threads
        self._ended: set[int] = set()
        self.dying: list[WorkerProcess] = []
        """Workers that were killed and have not ended: the kernel may take seconds on an overloaded machine."""
        self.socket = LeaderSocket()

    @property
    def dropped(self) -> int:
        return self._dropped.count

    def start(self, number: int, generation: int, device: Device) -> WorkerProcess:
        """Start a worker, which the kernel ends together with the calling thread."""
        entry = importlib.import_module(WORKER_MODULE)
        identity = f"worker-{number}-{generation}"
        crash_log = SharedMemory.create(CRASH_LOG_NBYTES + 8)
        try:
            listener = self.socket.invite(identity.encode())
        except BaseException:
            crash_log.close()
            raise
        try:
            config = entry.WorkerConfig(
                identity=identity,
                listener=listener,
                leader=os.getpid(),
                crash_log=f"/proc/{os.getpid()}/fd/{crash_log.handle.fd}",
                heartbeat_offset=CRASH_LOG_NBYTES,
                cores=device.cores,
                threads=self._threads,
                version=sys.version_info[:2],
                main=self._main,
            )
            process = Process(self._python, identity, entry.main, (config,))
            process.start()
        except BaseException:
            self.socket.dismiss(identity.encode())
            crash_log.close()
            raise
        finally:
            listener.close()
        worker = WorkerProcess(number, identity.encode(), device, process, crash_log, self)
        try:
            self.socket.watch(process.sentinel)  # Before its first message, so that an early exit is noticed.
        except OSError:  # The kernel has no memory for the watch.
            process.kill()
            self.dying.append(worker)
            self.socket.dismiss(worker.identity)
            raise
        self.workers[process.sentinel] = worker
        return worker

    def receive(self, ready: set[int]) -> list[Received]:
        received: list[Received] = []
        for identity, *frames in self.socket.receive():
            try:
                if len(frames) != 1:
                    raise ProtocolError(f"{len(frames)} frames; a message is one")
                message = decode(frames[0].bytes, TO_LEADER)
            except ProtocolError as error:
                self._dropped.add(f"no message: {error}")
                continue
            for worker in self.workers.values():
                if worker.identity == identity.bytes:
                    received.append((worker, message))
                    break
            else:
                self._dropped.add(f"a {type(message).__name__} from {identity.bytes!r}, which is not a worker")
        for sentinel in ready & self.workers.keys() if not received else ():
            worker = self.workers[sentinel]
            if worker.number not in self._ended and (worker.exit_code or 0) >= 0:
                self._ended.add(worker.number)
                self.socket.wait(LAST_MESSAGE_TIMEOUT)  # The next call returns its last message, and then its end.
            else:
                received.append((worker, None))
        return received

    def retire(self, worker: WorkerProcess) -> tuple[str, int | None]:
        del self.workers[worker.process.sentinel]
        self._ended.discard(worker.number)
        self.socket.forget(worker.process.sentinel)
        self.socket.dismiss(worker.identity)
        worker.process.kill()
        code = worker.exit_code
        how = worker.describe_exit(code)
        self.dying = [other for other in (*self.dying, worker) if not _released(other)]
        return how, code

    def close(self, grace: float) -> None:
        workers, self.workers = [*self.workers.values(), *self.dying], {}
        deadline = time.monotonic() + grace
        for worker in workers if grace > 0 else ():
            worker.send(worker.encode(Stop()))
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
        for worker in workers:
            if worker.process.is_alive():
                worker.process.kill()
        for worker in workers:
            worker.process.join(5.0)
            if not _released(worker):
                log.warning("%s does not end, though it was killed", worker)
                worker.crash_log.close()
        self.socket.close()


def _released(worker: WorkerProcess) -> bool:
    """Free a worker's resources if its process has ended; return whether it has."""
    if worker.process.is_alive():
        return False
    worker.process.close()
    worker.crash_log.close()
    return True


def _main_script() -> str:
    """Return the path of the main script, for a model that is defined there."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    if path is None or not Path(path).is_file():
        raise ValueError(
            "the model is made in __main__, which no worker can import: it has no file; put it in a module"
        )
    return str(Path(path).absolute())


def _refuse_inside_import() -> None:
    """Raise RuntimeError in a process that is importing the main script, where it would start leaders recursively."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "this script starts drp while it is being imported by a worker; put what it does under "
            "if __name__ == '__main__':"
        )
