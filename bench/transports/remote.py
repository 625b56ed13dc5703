"""drp with workers that dial in over TCP, as on other machines: with CURVE, placed by Ray, and without either."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from bench.transports.base import DEADLINE, Work
from bench.transports.ours import Ours
from drp.leader.ray import on_ray
from drp.leader.remote import RemoteWorkers


class OnRay(Ours):
    """Ray places the workers; drafts travel in messages over TCP, encrypted by CURVE."""

    name = "drp over TCP with CURVE, placed by Ray"

    def make_devices(self, work: Work) -> RemoteWorkers:
        """Return the workers that Ray places on its cluster, which this program is connected to."""
        return on_ray(workers=work.count, device=work.device)


class OverTcp(Ours):
    """The same without encryption, by processes `drp worker`."""

    name = "drp over TCP without encryption"

    def make_devices(self, work: Work) -> RemoteWorkers:
        """Start the worker processes, which dial the leader once it listens."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        drp, cores = str(Path(sys.executable).with_name("drp")), sorted(os.sched_getaffinity(0))
        command = [drp, "worker", address, "--transport-security", "none", "--device", work.device]
        self._workers = []
        for number in range(work.count):
            worker = subprocess.Popen(command)  # noqa: S603  # our own
            os.sched_setaffinity(worker.pid, {cores[number % len(cores)]})  # before it looks for its core
            self._workers.append(worker)
        return RemoteWorkers(work.count, address, transport_security="none")

    def close(self) -> None:
        """End the workers, with the leader."""
        super().close()
        for worker in self._workers:
            worker.wait(DEADLINE)
