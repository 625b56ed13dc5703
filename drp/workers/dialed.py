"""Entry of a worker on another machine, which dials its leader over TCP: `drp worker`, or an actor of Ray."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

from drp.protocol.dial import DialedSocket, WorkerKeys
from drp.protocol.messages import VERSION, Hello
from drp.workers.parent_death import LEADER_GONE
from drp.workers.worker import Worker


@dataclass(frozen=True)
class DialConfig:
    """How a worker dials its leader.

    address: the leader's, tcp://HOST:PORT.
    keys: None for a leader without encryption.
    device: the name of the worker's device, as the leader shows it: cpu:0, cuda:1 or emulated:20ms.
    gpu: the UUID of that device, if it is a GPU.
    threads: the number of torch threads.
    timeout: seconds within which the leader must have admitted this worker.
    host: the machine's name, by default its hostname.
    """

    address: str
    keys: WorkerKeys | None
    device: str
    gpu: str = ""
    threads: int = 1
    timeout: float = 300.0
    host: str = ""


def serve(config: DialConfig, on_lost: Callable[[], None]) -> None:
    """Evaluate drafts until the leader sends Stop; raise the error that ends this worker before.

    It is a WorkerError if the leader does not use this worker. `on_lost` is called in another thread if the connection
    is lost, even while a draft is being evaluated.
    """
    link = DialedSocket(config.address, config.keys, config.timeout, on_lost)
    hello = Hello(VERSION, os.getpid(), config.host or socket.gethostname()[:100], config.device, config.gpu)
    error = Worker(link, hello, config.threads).run()
    if error is not None:
        raise error


def main(config: DialConfig) -> None:
    """Run a worker in this process, which ends with its leader, even during an evaluation."""
    faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM):  # A KeyboardInterrupt would look like an error of the denoiser.
        signal.signal(number, signal.SIG_DFL)

    def end() -> None:
        sys.stderr.write(f"the connection to the leader at {config.address} is lost; this worker ends\n")
        sys.stderr.flush()
        os._exit(LEADER_GONE)

    serve(config, end)
