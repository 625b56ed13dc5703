"""Workers on other machines, here processes that dial in by TCP: bits, faults and the ends of either side."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from click.testing import CliRunner

import drp
from drp import ExecutionOptions, Leader, RemoteWorkers, WorkerError
from drp.cli import main
from drp.protocol.keys import make
from drp.simulate import Link
from tests.integration.test_lost_workers import program
from tests.remote import DEADLINE, ending, free_address, start_worker
from tests.waiting import until

TINY = "tests.denoisers:Tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("keys")
    make(made, [], ["anna", "berta", "carla"])
    return made


@pytest.fixture(scope="module")
def mixed(folder: Path) -> Iterator[Leader]:
    """One worker on this machine, and two that dial in, with one key."""
    address = free_address()
    workers = [
        start_worker(address, folder, "anna"),
        start_worker(address, folder, "anna", "--device", "emulated:2ms", "--threads", "1"),
    ]
    with ending(workers):
        with Leader(TINY, devices=["cpu:0", RemoteWorkers(2, address, folder)]) as leader:
            yield leader
        ends = [(worker.wait(DEADLINE), worker.communicate()[1]) for worker in workers]
        assert ends == [(0, ""), (0, "")]


@pytest.mark.parametrize("mode", ["aggressive", "conservative", "window", "adaptive", "rolling", "sequential"])
def test_the_bits_of_the_reference(mixed: Leader, mode: str) -> None:
    for drafts in (2, 4, 8):
        options: dict[str, Any] = {"labels": [3, 1], "steps": 24, "mode": mode, "drafts": drafts, "residuals": True}
        ours, theirs = mixed.sample(**options), drp.reference(TINY, devices=3, **options)
        assert torch.equal(ours.samples, theirs.samples)
        assert (ours.rounds, ours.evaluations, ours.residuals) == (theirs.rounds, theirs.evaluations, theirs.residuals)
        assert not ours.incidents


def test_several_runs_at_once_have_their_own_bits(mixed: Leader) -> None:
    options = [{"labels": [k], "steps": 10 + k, "seed": k, "mode": "aggressive"} for k in range(8)]
    futures = [mixed.submit(**each) for each in options]  # type: ignore[arg-type]  # options of a run
    for each, future in zip(options, futures, strict=True):
        expected = drp.reference(TINY, devices=3, **each)  # type: ignore[arg-type]  # likewise
        assert torch.equal(future.result(DEADLINE).samples, expected.samples)


def test_every_worker_says_where_it_is(mixed: Leader) -> None:
    host = os.uname().nodename
    first, *others = mixed.devices
    assert first == "cpu:0"
    assert sorted(others) == [f"{host}/cpu:0", f"{host}/emulated:2ms"]
    assert mixed.sample(labels=[1], steps=3).devices == mixed.devices
    assert [worker.device for worker in mixed.workers] == [*mixed.devices]


def test_times_of_evaluations_are_by_the_leaders_clock(mixed: Leader) -> None:
    mixed.timeline = []
    began = time.perf_counter()
    mixed.sample(labels=[1], steps=12, mode="aggressive")
    answers = [event for event in mixed.timeline if event.kind == "predicted"]
    mixed.timeline = None
    assert {event.worker for event in answers} == {0, 1, 2}
    for event in answers:
        assert event.times is not None
        assert event.times[0] <= event.times[1] <= event.times[3] < event.ns / 1e9  # none ends after it is known
        assert event.times[0] > began - 1.0  # by its clock to half a round trip, which a busy machine makes long


@pytest.mark.parametrize("transport_security", ["curve", "none"])
def test_batches_and_several_conditions(folder: Path, transport_security: Literal["curve", "none"]) -> None:
    address, keys = free_address(), folder if transport_security == "curve" else None
    options: dict[str, Any] = {"shape": (3, 4), "count": 2, "steps": 9, "cond": {"shift": torch.linspace(0, 1, 4)}}
    with (
        ending([start_worker(address, keys, "anna", "--device", "cpu:0", "--transport-security", transport_security)]),
        Leader(
            "tests.denoisers:make_free",
            devices=RemoteWorkers(1, address, keys, transport_security=transport_security),
            drafts_per_device=3,
        ) as leader,
    ):
        for shift in (0.0, 1.0):  # The second run uses the first one's memory again.
            options["cond"]["shift"] = torch.linspace(0, shift, 4)
            expected = drp.reference("tests.denoisers:make_free", drafts_per_device=3, **options)
            assert torch.equal(leader.sample(**options).samples, expected.samples)
        with pytest.raises(WorkerError, match=r"worker 0 \(.*/cpu:0, process \d+\) failed evaluating step .* of run"):
            leader.sample(**(options | {"cond": {"shift": torch.zeros(5)}}))
        assert leader.workers[0].losses == 0


@pytest.fixture
def spare(folder: Path) -> Iterator[tuple[Leader, list[subprocess.Popen[str]]]]:
    """Two workers, and one that waits to replace one of them."""
    address = free_address()
    workers = [start_worker(address, folder, name) for name in ("anna", "berta")]
    with (
        ending(workers),
        Leader("tests.denoisers:make_slow_sine", devices=RemoteWorkers(2, address, folder)) as leader,
    ):
        workers.append(start_worker(address, folder, "carla"))
        place = leader.internals.pool.remote
        assert place is not None
        until(lambda: bool(place._spares), "the third worker has dialed in")
        yield leader, workers


def test_a_killed_worker_is_replaced_and_one_that_stands_still_is_turned_away(
    spare: tuple[Leader, list[subprocess.Popen[str]]],
) -> None:
    leader, workers = spare
    options: dict[str, Any] = {"shape": (4,), "steps": 200, "mode": "aggressive"}
    expected = drp.reference("tests.denoisers:make_slow_sine", devices=2, **options).samples
    killed = leader.workers[0].pid

    def kill(step: int, state: object) -> None:
        if step == 50:
            assert killed is not None
            os.kill(killed, signal.SIGKILL)

    result = leader.sample(**options, callback=kill)
    assert torch.equal(result.samples, expected)
    (incident,) = result.incidents
    assert re.fullmatch(rf"worker 0 \(.*/cpu:0, process {killed}\) has lost its connection", incident)
    until(lambda: leader.workers[0].state == "ready", "the third worker has taken its place")

    stopped = next(worker for worker in workers if worker.pid == leader.workers[1].pid)
    os.kill(stopped.pid, signal.SIGSTOP)
    until(lambda: leader.workers[1].losses == 1, "it is noticed")
    os.kill(stopped.pid, signal.SIGCONT)
    _, errors = stopped.communicate(timeout=DEADLINE)
    assert stopped.returncode == 1
    words = r"Error: the leader does not use this worker: worker 1 .* is idle and has sent no heartbeat for 5 s.*\n"
    assert re.fullmatch(words, errors)
    assert torch.equal(leader.sample(**options).samples, expected)


def test_a_worker_that_evaluates_for_too_long_is_lost_and_says_so(folder: Path, tmp_path: Path) -> None:
    address, model, orders = free_address(), "tests.misbehaving:make", tmp_path / "orders"
    orders.write_text(json.dumps({"what": "hang", "path": str(tmp_path / "once")}))
    once = {"DRP_TEST_ORDERS": str(orders)}
    workers = [start_worker(address, folder, "anna", **once), start_worker(address, folder, "berta", **once)]
    options: dict[str, Any] = {"shape": (4,), "steps": 12, "mode": "aggressive"}
    with (
        ending(workers),
        Leader(model, devices=RemoteWorkers(2, address, folder), draft_timeout=1.5) as leader,
    ):
        result = leader.sample(**options)
        assert torch.equal(result.samples, drp.reference("tests.misbehaving:make_plain", devices=2, **options).samples)
        assert re.search(
            r"worker \d .* has not evaluated step \d+ of run 0 within 1.5 s \(draft_timeout\)", result.incidents[0]
        )
    for worker in workers:  # That one too which still evaluates: it has lost its leader.
        worker.wait(DEADLINE)


def test_other_weights_are_refused_with_both_digests(folder: Path) -> None:
    address = free_address()
    worker = start_worker(address, folder, "anna", DRP_TEST_SHIFT="0.5")
    with ending([worker]):
        with pytest.raises(
            WorkerError,
            match=r"has other weights of 'tests.denoisers:make_shifted' than worker \d .*: their digests are "
            r"[0-9a-f]{32} and [0-9a-f]{32}; give both machines the same files",
        ):
            Leader("tests.denoisers:make_shifted", devices=["cpu:0", RemoteWorkers(1, address, folder)])
        worker.wait(DEADLINE)


LEADER = """
    import sys
    import drp

    if __name__ == "__main__":
        remote = drp.RemoteWorkers(1, sys.argv[1], sys.argv[2])
        with drp.Leader("tests.denoisers:make_hanging", devices=remote) as leader:
            print(leader.workers[0].pid, flush=True)
            leader.sample(shape=(4,), steps=4)
"""


def test_a_worker_ends_with_its_leader_while_it_evaluates(folder: Path, tmp_path: Path) -> None:
    address = free_address()
    worker = start_worker(address, folder, "anna")
    leader = program(LEADER, tmp_path, address, str(folder))
    with ending([worker, leader]):
        assert leader.stdout is not None
        assert int(leader.stdout.readline()) == worker.pid
        time.sleep(1.0)  # It sleeps in its denoiser by now, for minutes.
        leader.kill()
        _, errors = worker.communicate(timeout=10)
        assert (worker.returncode, errors) == (
            3,
            f"the connection to the leader at {address} is lost; this worker ends\n",
        )


def test_the_doctor_measures_the_network(folder: Path) -> None:
    address = free_address()
    with ending([start_worker(address, folder, "anna")]):
        result = CliRunner().invoke(main, ["doctor", "--listen", address, "--keys", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["report"]["workers"] == [f"{os.uname().nodename}/cpu:0"]
    assert len(found["report"]["rounds"]) == 5
    assert all(seconds > 0 for seconds in found["report"]["rounds"].values())
    assert Link.parse(found["link"], None, 1 << 18).bandwidth > 0


def test_a_leader_that_no_worker_dials_says_where_it_listened(folder: Path) -> None:
    address = free_address()
    with pytest.raises(
        WorkerError, match=rf"worker 0 \(remote:0, which is to dial in at {address}\) did not start within 0.5 s"
    ):
        Leader(TINY, devices=RemoteWorkers(1, address, folder), start_timeout=0.5)


def test_what_cannot_be_is_refused_before_any_work(folder: Path, tmp_path: Path) -> None:
    two = [RemoteWorkers(1, "tcp://127.0.0.1:5555", folder)] * 2
    with pytest.raises(ValueError, match="devices holds 2 RemoteWorkers; a leader listens at one address, so give one"):
        Leader(TINY, devices=two)
    with pytest.raises(ValueError, match='dispatch is "async", which needs memory that all workers share'):
        Leader(TINY, devices=two[0], execution=ExecutionOptions(dispatch="async"))
    make(tmp_path, [])
    with pytest.raises(ValueError, match=r"no worker has a key in .*/workers; `drp keys .* --worker NAME` makes one"):
        Leader(TINY, devices=RemoteWorkers(1, "tcp://127.0.0.1:5555", tmp_path))
    for given, words in (
        ({"count": 0}, "count is 0; give a whole number, 1 to 256"),
        ({"listen": "ipc:///tmp/x"}, "listen is 'ipc:///tmp/x'; give tcp://HOST:PORT"),
        ({"keys": None}, "keys is None and transport_security 'curve'; give the directory"),
        ({"transport_security": "none"}, "keys is .* and transport_security 'none'"),
        ({"transport_security": "tls"}, "transport_security is 'tls'; give 'curve', or 'none'"),
    ):
        with pytest.raises(ValueError, match=words):
            RemoteWorkers(**({"count": 1, "listen": "tcp://127.0.0.1:5555", "keys": folder} | given))  # type: ignore[arg-type]  # on purpose


def test_an_address_in_use_is_a_clear_error(folder: Path, mixed: Leader) -> None:
    place = mixed.internals.pool.remote
    assert place is not None
    with pytest.raises(OSError, match=f"cannot listen on {place.address}: Address already in use"):
        Leader(TINY, devices=RemoteWorkers(1, place.address, folder))
