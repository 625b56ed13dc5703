"""The C++ client: golden vectors; the examples and eight clients at a real server, with the bits of the Python call."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

import drp
from drp import Client, Leader
from drp.errors import ProtocolError
from drp.protocol import client_messages
from drp.protocol.codec import decode
from drp.protocol.keys import Keys, make, pair, public
from tests.cpp_build import build
from tests.serving import Served, serving
from tests.waiting import until

HERE = Path(client_messages.__file__).with_name("vectors")
MODEL = "tests.denoisers:Tiny"
DEADLINE = 60.0
EACH = 63  # of eight clients: more than 500 requests
SHORT, LONG = 12, 600
CANCELLED, CLOSED = 6, 10  # codes of drp/client.h

pytestmark = [pytest.mark.cpp, pytest.mark.timeout(400)]  # the first test builds


@pytest.fixture(scope="module")
def programs() -> Path:
    return build("tests/cpp")


@pytest.fixture(scope="module")
def served(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("serve"), "-d", "2")
    try:
        yield served
        assert served.end() == (0, "")
    finally:
        served.process.kill()


@pytest.fixture(scope="module")
def emulated() -> Iterator[Leader]:
    with Leader(MODEL, devices="2xemulated:50ms") as leader:
        yield leader


def ran(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=DEADLINE)


def told(programs: Path, lines: str) -> dict[str, tuple[str, str]]:
    """Return what the client makes of vectors: by name, a word and what follows."""
    command = [str(programs / "check"), "vectors"]
    run = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=DEADLINE, check=True)
    words = (line.split(" ", 2) for line in run.stdout.splitlines())
    return {name: (word, rest) for name, word, rest in words}


def test_golden_vectors(programs: Path) -> None:
    found, facts = told(programs, (HERE / "client.hex").read_text()), json.loads((HERE / "client.json").read_text())
    expected = dict(line.split(" ") for line in (HERE / "client.hex").read_text().splitlines())
    assert {name: word for name, (word, _) in found.items()} == expected
    for name, (_, text) in found.items():
        # As text, which tells 1 from 1.0.
        assert json.dumps(json.loads(text), sort_keys=True) == json.dumps(facts[name], sort_keys=True), name


def test_what_must_be_refused_is(programs: Path) -> None:
    found = {name: word for name, (word, _) in told(programs, (HERE / "refused.hex").read_text()).items()}
    assert found == dict.fromkeys(json.loads((HERE / "refused.json").read_text()), "refused")


def mutated(data: bytes, draws: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draws.choice((1, 1, 2, 5))):
        place, byte = draws.randrange(len(changed) + 1), draws.choice((0xC0, 0xDB, 0xDF, 0xFF, draws.randrange(256)))
        how = draws.randrange(4)
        changed[place : place + (how != 3)] = (b"", bytes([byte]), changed[place : place + 20], bytes([byte]))[how]
    return bytes(changed)


def test_both_sides_refuse_the_same(programs: Path) -> None:
    draws = random.Random(7)
    golden = [bytes.fromhex(line.split(" ")[1]) for line in (HERE / "client.hex").read_text().splitlines()]
    messages = {f"m{i}": mutated(data, draws) for i, data in enumerate(golden * 100)}
    found = told(programs, "\n".join(f"{name} {data.hex() or '-'}" for name, data in messages.items()))
    kinds = {**client_messages.TO_SERVER, **client_messages.TO_CLIENT}
    accepted = 0
    for name, data in messages.items():
        try:
            decode(data, kinds)
            refused = False
        except ProtocolError:
            refused = True
        assert (found[name] == ("refused", "-")) == refused, data.hex()
        accepted += not refused
    assert accepted > 20


def test_the_example_in_cpp(programs: Path, served: Served, tmp_path: Path) -> None:
    samples = drp.reference(MODEL, labels=[3, 1, 4], devices=2).samples
    run = ran(programs / "examples/submit", served.address, "3,1,4", tmp_path / "out.f32")
    assert (run.returncode, run.stdout) == (0, f"window: 48 steps in 25 rounds, {tmp_path}/out.f32\n")
    assert "step 48 of 48" in run.stderr
    assert (tmp_path / "out.f32").read_bytes() == samples.numpy().tobytes()

    assert ran(programs / "examples/submit", served.address, "3,1,4", tmp_path / "out.pgm").returncode == 0
    side_by_side = torch.cat(list(samples), dim=2)[0]
    shades = ((side_by_side + 1) * 127.5).clamp(0, 255) + 0.5
    assert (tmp_path / "out.pgm").read_bytes() == b"P5\n24 8\n255\n" + shades.numpy().astype(np.uint8).tobytes()


def test_the_example_in_c(programs: Path, served: Served, tmp_path: Path) -> None:
    run = ran(programs / "examples/submit_c", served.address, "7", tmp_path / "out.f32")
    assert (run.returncode, run.stdout) == (0, "48 steps in 25 rounds\n")
    samples = drp.reference(MODEL, labels=[7], devices=2).samples
    assert (tmp_path / "out.f32").read_bytes() == samples.numpy().tobytes()


def test_the_entry_points_for_c(programs: Path, served: Served) -> None:
    run = subprocess.run([programs / "entry_points", served.address], capture_output=True, timeout=DEADLINE)
    assert (run.returncode, run.stderr) == (0, b"")
    noise = (torch.arange(64) % 7 - 3).float().view(1, 1, 8, 8) / 2
    options = {"solver": "dpmsolver++", "solver_options": {"order": 2}, "grid": {"sigmas": "karras"}}
    samples = drp.reference(MODEL, labels=[7], steps=8, drafts=2, noise=noise, **options).samples  # type: ignore[arg-type]
    assert run.stdout == samples.numpy().tobytes()


@pytest.mark.parametrize("program", ["submit", "submit_c"])
def test_errors_are_told(programs: Path, served: Served, tmp_path: Path, program: str) -> None:
    for address, label, words in (
        (served.address, "11", "label 11 is out of range; this model has the classes 0 to 9"),
        ("nowhere", "1", "'nowhere' is not an address; give ipc://PATH or tcp://HOST:PORT"),
        ("tcp://localhost:1", "1", "no keys are given for 'tcp://localhost:1'; `drp keys` makes them"),
    ):
        run = ran(programs / "examples" / program, address, label, tmp_path / "out.f32")
        assert run.returncode == 1
        assert words in run.stderr


def test_over_tcp_with_keys_and_without(programs: Path, tiny: Leader, tmp_path: Path) -> None:
    make(tmp_path, ["us"])
    make(tmp_path / "others", ["them"])
    server_key = public(tmp_path / "server.key").decode()

    def once(address: str, client: Path) -> str:
        keys = [key.decode() for key in pair(client)]
        return ran(programs / "check", "once", address, "12", server_key, *keys).stdout

    with serving(tiny, tmp_path, address="tcp://127.0.0.1:*", keys=Keys.read(tmp_path)) as server:
        # No handle travels over tcp: the samples come inline.
        assert once(server.address, tmp_path / "clients/us.key_secret") == f"running\nfinished {expected(1, 0):x}\n"
        assert once(server.address, tmp_path / "others/clients/them.key_secret").startswith("error 8 ")  # lost
        assert ran(programs / "check", "once", server.address, "12", server_key, "short", "keys").stdout.startswith(
            "error 1 "
        )


@pytest.mark.parametrize("program", ["check", "examples/submit", "examples/submit_c"])
def test_a_lost_worker_is_told(programs: Path, emulated: Leader, tmp_path: Path, program: str) -> None:
    rest = {"check": ["once", None, "48"]}.get(program, [None, "7", str(tmp_path / "out.f32")])
    with serving(emulated, tmp_path) as server:
        command = [str(programs / program), *(word or server.address for word in rest)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as client:
            until(lambda: server.status().requests == 1, "the run is under way")
            pid = emulated.workers[1].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            out, err = client.communicate(timeout=DEADLINE)
        assert client.returncode == 0, err
        assert re.search(rf"^meanwhile worker 1 \(.*, process {pid}\) was killed by SIGKILL", out + err, re.MULTILINE)
    until(lambda: all(worker.state == "ready" for worker in emulated.workers), "the worker is replaced")


def test_a_server_that_is_killed(programs: Path, tmp_path: Path) -> None:
    server = Served(tmp_path, "-d", "1")
    command = [str(programs / "check"), "once", server.address, "900"]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "running\n"
            server.process.kill()
            assert client.stdout.readline() == f"error 8 the server at {server.address} has closed the connection\n"
    finally:
        server.process.kill()
        server.process.communicate(timeout=DEADLINE)


# Eight clients of one server, four in C++ and four in Python: they finish, cancel, and leave; every answer is right.


def digest(samples: Tensor) -> int:
    """FNV-1a, as the C++ program's."""
    total = 0xCBF29CE484222325
    for byte in samples.numpy().tobytes():
        total = (total ^ byte) * 0x100000001B3 % 2**64
    return total


@cache
def expected(label: int, seed: int) -> int:
    return digest(drp.reference(MODEL, labels=[label, label + 1], seed=seed, steps=SHORT, devices=2).samples)


def in_cpp(programs: Path, address: str, seed: int, count: int) -> Counter[str]:
    """Run the C++ client; count what its requests came to."""
    run = subprocess.run(
        [programs / "check", "soak", address, str(seed), str(count)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    *lines, last = run.stdout.splitlines()
    assert (last, len(lines), run.stderr) == ("left", count - 1, "")
    found = Counter({"left": 1})
    for line in lines:
        label, noise, steps, kind, value, *_ = line.split(" ")
        if kind == "finished":
            assert int(value, 16) == expected(int(label), int(noise)), line
        else:
            assert (int(value), int(steps)) in ((CANCELLED, LONG), (CLOSED, LONG)), line
        found[kind if kind == "finished" else "cancelled" if int(value) == CANCELLED else "left"] += 1
    return found


def in_python(address: str, seed: int, count: int) -> Counter[str]:
    """Do the like with the Python client."""
    draws, found = random.Random(seed), Counter[str]()
    client = Client(address)
    for _ in range(count):
        label, noise, way = draws.randrange(4), draws.randrange(3), draws.randrange(10)
        steps, previews = (LONG if way < 3 else SHORT), (3 if way == 3 else 0)
        run = client.submit(labels=[label, label + 1], seed=noise, steps=steps, progress=way != 4, previews=previews)
        if way in (1, 2):
            next(run.progress())
        if way == 2:  # half-way, without a word
            client.close()
            client = Client(address)
        elif way < 2:
            run.cancel()
        try:
            assert digest(run.result(60).samples) == expected(label, noise)
            found["finished"] += 1
        except CancelledError:
            assert steps == LONG
            found["left" if way == 2 else "cancelled"] += 1
    client.close()
    return found


def test_five_hundred_requests_of_eight_clients(programs: Path, served: Served) -> None:
    process = psutil.Process(served.process.pid)
    for label in range(4):
        for seed in range(3):
            expected(label, seed)

    def all_clients(first: int, count: int) -> Counter[str]:
        with ThreadPoolExecutor(8) as pool:
            runs = [pool.submit(in_cpp, programs, served.address, first + i, count) for i in range(4)]
            runs += [pool.submit(in_python, served.address, first + i, count) for i in range(4)]
            return sum((run.result(120) for run in runs), Counter())

    with Client(served.address) as watcher:

        def settled() -> tuple[int, int]:
            until(lambda: (watcher.status().requests, watcher.status().clients) == (0, 1), "nothing is left running")
            until(lambda: served.memory() == baseline, "all shared memory is given back")
            return process.memory_info().rss, served.descriptors()

        baseline = served.memory()
        all_clients(100, 10)  # what grows at first, has grown
        resident, descriptors = settled()
        began = watcher.status()
        found = all_clients(200, EACH)
        assert found.total() == 8 * EACH
        assert min(found[kind] for kind in ("finished", "cancelled", "left")) > 20, found
        resident_after, descriptors_after = settled()
        now = watcher.status()

    ended = now.finished + now.cancelled + now.failed - began.finished - began.cancelled - began.failed
    assert (ended, now.failed, now.refused) == (8 * EACH, began.failed, began.refused)
    assert descriptors_after == descriptors
    assert resident_after < resident + 8_000_000, f"{resident} bytes before, {resident_after} after"
