"""Many requests from many clients, some of which change their minds or vanish: every answer right, nothing left."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import drp
from drp import Client
from tests.serving import LONG, ROOT, Served
from tests.waiting import until

CLIENTS = 8
SEEDS = 12
ROOM = 4 << 20
"""Bytes by which the server and its workers may grow."""


def samples(seed: int) -> torch.Tensor:
    return drp.reference("tests.denoisers:Tiny", devices=2, labels=[seed % 10], seed=seed, steps=9).samples


def ours(address: str, number: int, count: int, expected: list[torch.Tensor], counts: dict[str, int]) -> None:
    """Do with `drp.Client` what tests.soak_client does without."""
    draws = random.Random(number)
    client = Client(address)
    for _ in range(count):
        seed, what = draws.randrange(SEEDS), draws.random()
        options: dict[str, Any] = {"labels": [seed % 10], "seed": seed}
        if what < 0.7:
            counts["wrong"] += not torch.equal(client.sample(steps=9, **options).samples, expected[seed])
            counts["finished"] += 1
            continue
        run = client.submit(progress=True, **options, **LONG)
        next(run.progress())
        if what > 0.85:
            client.close()
            client = Client(address)
            counts["left"] += 1
        else:
            run.cancel()
        try:
            run.result(30)
        except CancelledError:
            counts["cancelled"] += what <= 0.85
    client.close()


def size(process: psutil.Process) -> int:
    """Return the bytes that a server and its workers have for themselves."""
    return sum(int(each.memory_full_info().uss) for each in (process, *process.children(recursive=True)))


def round_of(address: str, requests: int, expected: list[torch.Tensor], turn: int) -> dict[str, int]:
    """Have half of the clients in this process and half in their own make so many requests; return what they tell."""
    counts = [dict.fromkeys(("finished", "cancelled", "left", "wrong"), 0) for _ in range(CLIENTS // 2)]
    shares = [len(range(each, requests, CLIENTS)) for each in range(CLIENTS)]
    digests = json.dumps([hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in expected])
    others = []
    for each in range(CLIENTS // 2, CLIENTS):
        command = [sys.executable, "-m", "tests.soak_client", address, str(turn * CLIENTS + each), str(shares[each])]
        others.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    threads = [
        threading.Thread(target=ours, args=(address, turn * CLIENTS + each, shares[each], expected, counts[each]))
        for each in range(CLIENTS // 2)
    ]
    for thread in threads:
        thread.start()
    answers = [json.loads(other.communicate(digests, timeout=90)[0]) for other in others]
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive()
    return {name: sum(each[name] for each in (*counts, *answers)) for name in counts[0]}


@pytest.mark.faults
def test_every_answer_is_right_and_nothing_is_left(tmp_path: Path) -> None:
    expected = [samples(seed) for seed in range(SEEDS)]
    requests, served = 500, Served(tmp_path, "-d", "2")
    try:
        process = psutil.Process(served.process.pid)
        with Client(served.address) as client:
            first = round_of(served.address, requests // 4, expected, turn=0)
            until(lambda: client.status().requests == 0, "no run of the first round is left")
            before, descriptors = size(process), served.descriptors()
            second = round_of(served.address, requests - requests // 4, expected, turn=1)
            until(lambda: client.status().requests == 0, "no run is left")
            until(lambda: client.status().clients == 1, "no client is left")
            until(lambda: served.memory() == served.idle, "no memory is left")
            status = client.status()
            grown = size(process) - before
        counts = {name: first[name] + second[name] for name in first}
        assert counts["wrong"] == 0
        assert counts["finished"] + counts["cancelled"] + counts["left"] == requests
        assert min(counts["cancelled"], counts["left"]) >= requests // 20
        assert status.finished == counts["finished"]
        assert status.cancelled == counts["cancelled"] + counts["left"]
        assert (status.failed, status.refused) == (0, 0)
        assert served.descriptors() <= descriptors
        assert grown < ROOM
    finally:
        ended = served.end()
    assert ended == (0, "")


@pytest.mark.faults
def test_a_stopped_client_is_no_other_clients_matter_and_its_runs_end_with_it(tmp_path: Path) -> None:
    served = Served(tmp_path, "-d", "2")
    program = [sys.executable, str(ROOT / "tests" / "plain_client.py"), served.address]
    try:
        with Client(served.address) as client, subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as stopped:
            assert stopped.stdout is not None
            assert stopped.stdout.readline() == "accepted\n"
            stopped.send_signal(signal.SIGSTOP)
            assert client.sample(labels=[1], steps=3).steps == 3
            assert client.status().clients == 2
            stopped.kill()
            until(lambda: client.status().clients == 1, "its connection is closed")
            until(lambda: client.status().requests == 0, "its run has ended")
            status = client.status()
        assert (status.requests, status.cancelled, status.finished) == (0, 1, 1)
    finally:
        ended = served.end()
    assert ended == (0, "")
