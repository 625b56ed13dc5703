"""Two network namespaces, as two machines, and a wire between them that delays and drops packets or is cut.

    unshare --net python -m tests.two_machines delayed

The kernel's own `netem` is missing in many kernels. Here each namespace has a TUN device, and this process carries the
packets from one to the other, so that TCP itself sees the delay, the loss and the partition.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch

import drp
from drp import Leader, RemoteWorkers, WorkerError
from drp.leader.scheduling.policies import Barrier
from drp.protocol.keys import make
from drp.sampling.modes import Aggressive
from drp.simulate import Costs, Workload, make_devices, simulate
from tests.remote import DEADLINE, ROOT, ending
from tests.waiting import until

HERE, THERE, PORT = "10.77.0.1", "10.77.0.2", 5555
TUNSETIFF, TUN_WITHOUT_HEADER = 0x400454CA, 0x1001
MTU: Final = 1500
MODEL = "tests.denoisers:make_slow_sine"
OPTIONS: dict[str, Any] = {"shape": (512,), "steps": 24, "mode": "aggressive"}
REPLACED = 40.0
"""Seconds for which a leader without any worker waits for another one: its `start_timeout`."""
NOTICED = 20.0
"""Seconds within which a partition must be noticed by both sides; 10 s are stated, and the rest is a busy machine's."""


class Wire:
    """Carries packets between two TUN devices.

    delay: seconds for which each packet is on its way.
    loss: the share of packets that are lost.
    cut: whether all are.
    """

    def __init__(self) -> None:
        self.delay, self.loss, self.cut = 0.0, 0.0, False
        self.carried = self.lost = 0
        self._ends = [_open_tun(name) for name in ("drp0", "drp1")]
        threading.Thread(target=self._carry, name="wire", daemon=True).start()

    def _carry(self) -> None:
        draws, order = random.Random(1), itertools.count()
        under_way: list[tuple[float, int, int, bytes]] = []
        while True:
            wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 1.0
            for end in select.select(self._ends, (), (), wait)[0]:
                try:
                    packet = os.read(end, MTU + 100)
                except OSError:  # The other namespace, and the device in it, have ended.
                    return
                if self.cut or draws.random() < self.loss:
                    self.lost += 1
                    continue
                other = self._ends[1 - self._ends.index(end)]
                heapq.heappush(under_way, (time.monotonic() + self.delay, next(order), other, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(under_way)
                with contextlib.suppress(OSError):  # The device is down, with its namespace.
                    os.write(end, packet)
                    self.carried += 1


def _open_tun(name: str) -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), TUN_WITHOUT_HEADER))
    return tun


def report(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _call(*command: str) -> None:
    subprocess.run(command, check=True, timeout=DEADLINE)


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Wire, list[str]]]:
    """Yield the wire, and the beginning of a command that is to be run in the other namespace."""
    wire = Wire()
    there = subprocess.Popen(["unshare", "--net", "sleep", "600"])
    with ending([there]):  # type: ignore[list-item]  # of bytes
        enter = ["nsenter", f"--net=/proc/{there.pid}/ns/net"]
        own = Path("/proc/self/ns/net").readlink()
        deadline = time.monotonic() + DEADLINE
        while Path(f"/proc/{there.pid}/ns/net").readlink() == own:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        _call("ip", "link", "set", "lo", "up")
        _call("ip", "link", "set", "drp1", "netns", str(there.pid))
        for prefix, device, address in (([], "drp0", HERE), (enter, "drp1", THERE)):
            _call(*prefix, "ip", "address", "add", f"{address}/24", "dev", device)
            _call(*prefix, "ip", "link", "set", device, "mtu", str(MTU), "up")
        yield wire, enter


@contextlib.contextmanager
def workers_there(folder: Path, enter: list[str], count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Start workers in the other namespace, which dial this one."""
    drp_there = str(Path(sys.executable).with_name("drp"))
    command = [*enter, drp_there, "worker", f"tcp://{HERE}:{PORT}"]
    command += ["--key", str(folder / "workers" / "anna.key_secret"), "--device", "cpu:0"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    made = [subprocess.Popen(command, env=environ, stdout=pipe, stderr=pipe, text=True) for _ in range(count)]
    with ending(made):
        yield made


def leader(folder: Path, here: int, there: int) -> Leader:
    remote = RemoteWorkers(there, f"tcp://{HERE}:{PORT}", folder)
    return Leader(MODEL, devices=[*["cpu:0"] * here, remote], start_timeout=REPLACED)


def cutting(wire: Wire, step: int, seconds: float | None = None) -> Callable[[int, object], None]:
    """Return a callback that cuts the wire at a step, for some time or for good."""

    def on_step(now: int, state: object) -> None:
        if now == step:
            wire.cut = True
            if seconds is not None:
                threading.Timer(seconds, setattr, (wire, "cut", False)).start()

    return on_step


def delayed(folder: Path, wire: Wire, enter: list[str]) -> None:
    """A delay of 200 ms there and back, and 1 % of packets lost; then a partition of 2 s: the bits are the same."""
    expected = drp.reference(MODEL, devices=3, **OPTIONS)
    wire.delay = 0.1
    with workers_there(folder, enter, 2), leader(folder, 1, 2) as led:
        result = led.sample(**OPTIONS)
        devices = make_devices("emulated:20ms,2xemulated:20ms:link=100ms")
        simulated = simulate(devices, Barrier(), Workload(Aggressive(3), OPTIONS["steps"], 1), Costs()).median
        report(f"{result.rounds} rounds with a delay of 200 ms: {result.seconds:.2f} s, simulated {simulated:.2f} s")
        assert torch.equal(result.samples, expected.samples)
        wire.loss, before = 0.01, wire.lost
        for _ in range(5):
            result = led.sample(**OPTIONS)
            assert torch.equal(result.samples, expected.samples)
            assert result.incidents == ()
        report(f"{wire.lost - before} packets of {wire.carried} were lost")
        assert wire.lost > before
        wire.loss = 0.0
        result = led.sample(**OPTIONS, callback=cutting(wire, 8, 2.0))
        assert torch.equal(result.samples, expected.samples)
        assert result.incidents == ()
        assert [worker.losses for worker in led.workers] == [0, 0, 0]


def parted(folder: Path, wire: Wire, enter: list[str]) -> None:
    """A partition for good: the worker that is left computes the same bits, and both sides end the connection."""
    expected = drp.reference(MODEL, devices=3, **OPTIONS)
    with workers_there(folder, enter, 2) as workers, leader(folder, 1, 2) as led:
        began = time.monotonic()
        result = led.sample(**OPTIONS, callback=cutting(wire, 8))
        report(f"a partition was noticed after {time.monotonic() - began:.1f} s: {result.incidents}")
        assert time.monotonic() - began < NOTICED
        assert torch.equal(result.samples, expected.samples)
        assert len(result.incidents) == 2
        assert all(f"({os.uname().nodename}/cpu:0, process " in incident for incident in result.incidents)
        for worker in workers:
            _, errors = worker.communicate(timeout=NOTICED)
            assert (worker.returncode, "the connection to the leader" in errors) == (3, True), errors


def alone(folder: Path, wire: Wire, enter: list[str]) -> None:
    """A partition from all workers: one that dials in later ends the run; without, the error says what was lost."""
    expected = drp.reference(MODEL, devices=1, **OPTIONS)
    with workers_there(folder, enter, 1), leader(folder, 0, 1) as led:
        run = led.submit(**OPTIONS, callback=cutting(wire, 8))
        until(lambda: led.workers[0].losses == 1, "the partition is noticed")
        wire.cut = False
        with workers_there(folder, enter, 1):
            result = run.result(REPLACED)
            report(f"the run went on after {result.incidents}")
            assert torch.equal(result.samples, expected.samples)
            began = time.monotonic()
            with pytest.raises(WorkerError) as error:
                led.sample(**OPTIONS, callback=cutting(wire, 8))
            report(f"after {time.monotonic() - began:.1f} s: {error.value}")
            assert f"worker 0 ({os.uname().nodename}/cpu:0, process " in str(error.value)
            assert led.closed


SCENARIOS = {scenario.__name__: scenario for scenario in (delayed, parted, alone)}


def main(name: str) -> None:
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="drp-test-"))
    try:
        make(folder, [], ["anna"])
        with two_machines() as (wire, enter):
            SCENARIOS[name](folder, wire, enter)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1])
