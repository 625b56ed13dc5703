"""The front door: a server process as `drp serve` runs it, or one in this process where a test reaches inside."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
import zmq
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

import drp
from drp import Client, Leader
from drp.cli import main
from drp.client import RefusedError
from drp.errors import ProtocolError, WorkerError
from drp.leader.runs.submission import RunFuture
from drp.protocol import client_messages
from drp.protocol.arrays import Library, open_array
from drp.protocol.client_messages import TensorData
from drp.protocol.codec import decode, encode
from drp.protocol.handles import Handle
from drp.protocol.keys import Keys, make
from drp.sampling.drafts import PAPER, DraftRule
from drp.sampling.modes import Sequential
from drp.sampling.result import Result
from drp.server import clients
from drp.server.options import finished
from drp.server.server import Server
from drp.server.server_request import ServerRequest
from tests.plain_client import Plain
from tests.unit.test_spec import facts, lines

ROOT = Path(__file__).parents[2]
DEADLINE = 20.0
LONG: dict[str, Any] = {"steps": 900, "sweeps": 50}


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline, f"not so in time: {what}"
        time.sleep(0.01)


class Served:
    """`drp serve` as a process, and where it listens."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self.address = folder, f"ipc://{folder}/door/socket"
        command = [str(Path(sys.executable).with_name("drp")), "serve", "tests.denoisers:Tiny", "-l", self.address]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [*command, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
        )
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()
        self.idle = self.memory()

    def memory(self) -> int:
        """Count its descriptors of shared memory: of workers and results, not of runs, whose memory is used again."""
        return sum("memfd:drp " in target for target in self._descriptors())

    def descriptors(self) -> int:
        """Count all others too, but those of runs: as many are kept as there were at once."""
        return sum("memfd:drp-run" not in target for target in self._descriptors())

    def _descriptors(self) -> list[str]:
        found = []
        for path in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found.append(str(path.readlink()))
        return found

    def end(self) -> tuple[int, str]:
        """Ask it to end; return how it did, and what it wrote to stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, errors


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("serve"), "-d", "2", "--max-requests", "16")
    try:
        assert server.first_line == f"serving tests.denoisers:Tiny on cpu:0, cpu:1 at {server.address}\n"
        yield server
        assert server.end() == (0, "")
        assert not Path(server.address.removeprefix("ipc://")).exists()
    finally:
        server.process.kill()


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.address) as client:
        yield client


@pytest.fixture
def plain(served: Served) -> Iterator[Plain]:
    plain = Plain(served.address)
    yield plain
    plain.close()


@contextlib.contextmanager
def serving(leader: Leader, folder: Path, **options: Any) -> Iterator[Server]:
    """Run a server in a thread; what it raises, it raises here."""
    options.setdefault("address", f"ipc://{folder}/door/socket")
    server = Server(leader, "model", **options)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield server
    finally:
        server.drain(0.0)
        thread.join(DEADLINE)
        assert not thread.is_alive()
        server.close()
    if errors:
        raise errors[0]


def test_the_same_bits_as_the_leader(client: Client) -> None:
    for mode in ("sequential", "conservative", "aggressive", "adaptive"):
        options: dict[str, Any] = {
            "labels": [1, 4],
            "steps": 13,
            "seed": 5,
            "mode": mode,
            "residuals": True,
        }
        ours, theirs = client.sample(**options), drp.reference("tests.denoisers:Tiny", devices=2, **options)
        assert torch.equal(ours.samples, theirs.samples)
        facts = ("mode", "drafts", "steps", "rounds", "evaluations", "residuals", "cuts")
        assert all(getattr(ours, fact) == getattr(theirs, fact) for fact in facts)
    assert ours.devices == client.devices == ("cpu:0", "cpu:1")
    assert client.spec == drp.ModelSpec(sample_shape=(1, 8, 8), classes=10)


ALL: list[dict[str, Any]] = [
    {"solver": "dpmsolver++", "solver_options": {"order": 3}, "grid": {"sigmas": "karras"}, "tolerance": float("inf")},
    {"solver": "ddim", "solver_options": {"eta": 0.5}, "grid": {"spacing": "leading", "offset": 1}, "rule": "paper"},
    {"solver": "unipc", "solver_options": {"corrector": False}, "prediction_type": "flow", "grid": {"shift": 3.0}},
    {"solver": "euler", "grid": {"sigmas": [14.0, 7.5, 3, 1.0, 0.5, 0.1]}, "rule": DraftRule(0.5, 0.25)},
    {"cond": {"shift": torch.linspace(0, 1, 12).view(4, 3).T}, "rule": PAPER},
    {"noise": torch.linspace(-1, 1, 24).view(2, 3, 4), "mode": "conservative", "drafts": 3, "warmup": 1, "sweeps": 1},
    {"image": torch.ones(2, 3, 4), "strength": 0.5, "target_speedup": 1.5, "drafts": 4, "mode": "window"},
]


@pytest.mark.parametrize("options", ALL, ids=lambda options: next(iter(options)))
def test_every_option_arrives(free: Leader, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"shape": (3, 4), "count": 2, "steps": 6, **options}
    with serving(free, tmp_path) as server, Client(server.address) as client:
        assert torch.equal(client.sample(**options).samples, free.sample(**options).samples)


def test_large_samples_come_in_shared_memory_and_it_is_given_back(served: Served, client: Client) -> None:
    labels = [1] * 2000
    samples = client.sample(labels=labels, steps=2).samples
    assert torch.equal(samples, drp.reference("tests.denoisers:Tiny", labels=labels, steps=2, devices=2).samples)
    mapped = Path("/proc/self/maps").read_text().count("memfd:drp")
    assert mapped > 0, "the samples were copied"
    until(lambda: served.memory() == served.idle, "the server has closed the memory of the result")
    samples += 1  # The memory is the client's alone now.


def test_memory_that_cannot_be_mapped_fails_its_run_alone(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:  # as where the server's processes cannot be seen

        def elsewhere(data: TensorData, library: Library) -> Any:
            return open_array(dataclasses.replace(data, memory=Handle(2**31 - 1, 1, 10**6)), library)

        patched.setattr("drp.client.run.open_array", elsewhere)
        with pytest.raises(ProtocolError, match="cannot be opened"):
            client.sample(labels=[1] * 2000, steps=2)
    until(lambda: served.memory() == served.idle, "the server has closed the memory of the result")
    assert client.sample(labels=[1] * 2000, steps=2).rounds == 2


def test_no_preview_is_lost_to_news_that_are_told_while_it_is_made() -> None:
    """The leader's thread is at any of its lines when the server's asks."""
    ticket = ServerRequest(b"", client_messages.Submit(1, previews=4), lambda ticket: None, lambda: None)
    ticket.future = RunFuture(lambda: None)
    told: list[client_messages.Progress] = []

    class Slow(torch.Tensor):
        def cpu(self, *_: object, **__: object) -> torch.Tensor:
            told.extend(progress for progress, _ in ticket.updates(lambda ticket, most: ()))
            return torch.ones(2)

    for step in range(1, 13):
        ticket.on_step(step, torch.zeros(2).as_subclass(Slow))
    told.extend(progress for progress, _ in ticket.updates(lambda ticket, most: ()))
    assert [progress.step for progress in told if progress.preview is not None] == [4, 8, 12]
    assert [progress.step for progress in told] == sorted(progress.step for progress in told)


def test_updates_with_previews_and_evaluations(client: Client) -> None:
    run = client.submit(labels=[3], steps=12, previews=4, timeline=True)
    updates = list(run.progress())
    result = run.result(DEADLINE)
    steps = [update.step for update in updates]
    assert steps == sorted(steps)
    assert (steps[-1], updates[-1].steps, updates[-1].rounds) == (12, 12, result.rounds)
    last = [update.preview for update in updates if update.preview is not None][-1]
    assert torch.equal(last, result.samples)
    evaluations = [each for update in updates for each in update.evaluations]
    assert sorted(each.index for each in evaluations) == list(range(12))
    assert all(0 < each.began <= each.ended < 20 and each.worker in (0, 1) for each in evaluations)
    assert list(run.progress()) == []


def test_threads_share_a_client(client: Client) -> None:
    samples: dict[int, torch.Tensor] = {}

    def work(seed: int) -> None:
        samples[seed] = client.sample(labels=[1], steps=9, seed=seed).samples

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    for seed in range(6):
        expected = drp.reference("tests.denoisers:Tiny", devices=2, labels=[1], steps=9, seed=seed)
        assert torch.equal(samples[seed], expected.samples)


def test_cancel(client: Client) -> None:
    run = client.submit(labels=[1], **LONG, progress=True)
    assert next(run.progress()).step >= 1
    assert run.cancel()
    with pytest.raises(CancelledError):
        run.result(DEADLINE)
    assert not run.cancel()
    until(lambda: client.status().requests == 0, "nothing is left running")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [11]}, "label 11 is out of range; this model has the classes 0 to 9"),
        ({"labels": None}, "labels are missing"),
        ({"labels": [0.5]}, "0.5"),
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"steps": 4.0}, "Submit.steps: 4.0"),
        ({"steps": 1001}, "steps is 1001"),
        ({"seed": -1}, "Submit.seed: -1"),
        ({"labels": [1] * 99_999, "shape": (1, 800, 800)}, "ask for fewer"),
        ({"labels": [1] * 20_000}, "there are 20000 labels; at most 16384"),
        ({"solver": "ddim", "solver_options": {"order": 2}}, "solver_options holds 'order'"),
        ({"grid": {"sigmas": None}}, "takes numbers, text and lists"),
        ({"mode": Sequential()}, "mode is an object"),
        ({"callback": print}, r"iterate over client.submit\(...\).progress\(\)"),
        ({"cond": {"x": 3}}, "x is a int; give a tensor"),
    ],
)
def test_bad_options_are_refused(client: Client, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        client.sample(**{"labels": [1], **options})
    with pytest.raises(TypeError, match="step"):
        client.sample(labels=[1], step=4)  # type: ignore[call-arg]  # wrong on purpose


def test_status_and_metrics(served: Served, client: Client) -> None:
    client.sample(labels=[1], steps=5)
    before = client.status()
    client.sample(labels=[1], steps=5)
    status = client.status()
    assert (status.state, status.healthy, status.requests, status.max_requests) == ("serving", True, 0, 16)
    assert status.finished == before.finished + 1
    text = client.metrics()
    found = {s.name: s for family in text_string_to_metric_families(text) for s in family.samples if not s.labels}
    assert found["drp_requests"].value == 0
    assert found["drp_request_seconds_count"].value == status.finished
    assert found["drp_steps_total"].value >= 10
    assert found["drp_healthy"].value == 1
    done = CliRunner().invoke(main, ["status", served.address])
    assert done.exit_code == 0, done.output
    assert "state: serving\nhealthy: True" in done.output
    shown = json.loads(CliRunner().invoke(main, ["status", served.address, "--json"]).stdout)
    assert (shown["state"], shown["healthy"], shown["max_requests"]) == ("serving", True, 16)
    both = CliRunner().invoke(main, ["status", served.address, "--json", "--metrics"])
    assert "leave out --json" in both.stderr


# A client that knows the specification alone.


def test_plain_samples_are_the_same_bits(plain: Plain) -> None:
    expected = drp.reference("tests.denoisers:Tiny", labels=[3, 1], steps=8, seed=2, devices=2)
    opened = plain.open()
    assert opened["spec"] == {"sample_shape": [1, 8, 8], "classes": 10, "guidance": None}
    for request, memory in ((0, False), (1, True)):
        plain.submit(request, labels=[3, 1], steps=8, seed=2, memory=memory)
        assert plain.hear("Accepted") == {"type": "Accepted", "request": request, "ahead": 0}
        finished = plain.hear("Finished")
        assert finished["request"] == request
        assert finished["samples"]["shape"] == [2, 1, 8, 8]
        assert (finished["samples"]["memory"] is not None) == memory
        assert plain.floats(finished["samples"]) == expected.samples.flatten().tolist()
        assert (finished["rounds"], finished["evaluations"]) == (expected.rounds, expected.evaluations)
    plain.say("Ack", request=1)


def test_plain_progress_tensors_and_cancel(plain: Plain) -> None:
    plain.open()
    noise = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    tensor = {"dtype": "float32", "shape": [1, 1, 8, 8], "frame": 1, "memory": None}
    plain.submit(4, noise.numpy().tobytes(), labels=[2], steps=6, noise=tensor, previews=1)
    plain.hear("Accepted")
    last = None
    while (message := plain.hear("Progress", "Finished"))["type"] == "Progress":
        last = plain.floats(message["preview"]) if message["preview"] else last
    expected = drp.reference("tests.denoisers:Tiny", labels=[2], steps=6, devices=2, noise=noise).samples
    assert plain.floats(message["samples"]) == last == expected.flatten().tolist()
    plain.submit(4, labels=[1], **LONG)
    plain.hear("Accepted")
    plain.say("Cancel", request=4)
    assert plain.hear("Ended")["code"] == "cancelled"
    plain.say("Cancel", request=4)  # There is no such request any more: no answer.
    plain.say("Query", what="status")
    assert plain.hear("Status")["requests"] == 0


def test_plain_refusals(plain: Plain) -> None:
    plain.say("Query", what="status")
    assert "before Open" in plain.hear("Refused")["reason"]
    plain.say("Open", version=99, name="from the future")
    refused = plain.hear("Refused")
    assert (refused["code"], refused["request"]) == ("version", None)
    assert "version 3" in refused["reason"]
    plain.open()
    plain.submit(1, labels=[77])
    refused = plain.hear("Refused")
    assert (refused["code"], refused["request"]) == ("invalid", 1)
    for frames, tensor in (
        ([], {"frame": 1}),
        ([b"12"], {"frame": 1}),
        ([b"1234", b"1234"], {"frame": 1}),
        ([b"1234"], {"frame": 2}),
        ([b"1234"], {"frame": 1, "dtype": "object"}),
        ([b"1234"], {"frame": 1, "memory": {"pid": 1, "fd": 1, "nbytes": 4}}),
    ):
        given = {"dtype": "float32", "shape": [1], "memory": None, **tensor}
        plain.submit(1, *frames, labels=[1], cond=[{"name": "c", "tensor": given}])
        refused = plain.hear("Refused")
        assert (refused["code"], refused["request"]) == ("protocol", 1), frames
    plain.say("Cancel", b"surplus", request=1)
    assert plain.hear("Refused")["code"] == "protocol"
    for kind, change in (("Submit", {"steps": 10**6}), ("Cancel", {})):
        plain.say(kind, **{"request": 1, **change, "surplus": 1})
        assert plain.hear("Refused")["code"] == "protocol"
    plain.submit(1, labels=[1], steps=3)  # The session goes on.
    plain.hear("Accepted")
    plain.hear("Finished")


def test_what_must_be_refused_is_and_the_server_goes_on(plain: Plain) -> None:
    plain.open()
    directions = {name: data for name, data in lines("refused").items() if name.split("/")[0] in ("client", "any")}
    for name, data in directions.items():
        plain.socket.send(data)
        assert plain.hear()["type"] == "Refused", (name, facts("refused")[name])
    plain.say("Query", what="metrics")
    assert f"drp_bad_messages_total {len(directions)}" in plain.hear("Metrics")["text"] or len(directions) > 5


def test_a_number_in_use_is_refused(plain: Plain) -> None:
    plain.open()
    plain.submit(1, labels=[1], **LONG)
    plain.hear("Accepted")
    plain.submit(1, labels=[1])
    refused = plain.hear("Refused")
    assert (refused["code"], refused["request"]) == ("protocol", None)
    plain.say("Cancel", request=1)
    plain.hear("Ended")


OPENED = {
    "type": "Welcome",
    "version": 3,
    "model": "m",
    "spec": {"sample_shape": [1], "classes": None, "guidance": None},
    "devices": ["cpu:0"],
    "max_requests": 1,
}


def another_version(address: str, *answers: dict[str, Any]) -> None:
    """Answer so many messages of one client, as a server of a version that is not this one."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.linger = 1000
        socket.bind(address)
        for answer in answers:
            assert socket.poll(round(DEADLINE * 1000))
            client, *_ = socket.recv_multipart()
            socket.send_multipart([client, msgpack.packb(answer)])


@pytest.mark.parametrize("code", ["elsewhere", "cancelled"])  # a new word, and one that means an end, not a refusal
def test_a_refusal_with_a_code_that_is_not_known(tmp_path: Path, code: str) -> None:
    refused = {"type": "Refused", "request": None, "code": code, "reason": "ask next door"}
    with ThreadPoolExecutor(1) as pool:
        server = pool.submit(another_version, f"ipc://{tmp_path}/first", refused)
        with pytest.raises(RefusedError, match=f"^{code}: ask next door$") as error:
            Client(f"ipc://{tmp_path}/first")
        assert error.value.code == code
        server.result(DEADLINE)
        server = pool.submit(another_version, f"ipc://{tmp_path}/second", OPENED, refused | {"request": 1})
        with Client(f"ipc://{tmp_path}/second") as client:
            with pytest.raises(RefusedError, match="ask next door") as error:
                client.submit(steps=2).result(DEADLINE)
            assert error.value.code == code
        server.result(DEADLINE)


# Clients that go, and too many of them.


def test_more_than_it_takes_is_refused(client: Client) -> None:
    runs = [client.submit(labels=[1], **LONG) for _ in range(20)]
    refused = 0
    for run in runs[16:]:
        with pytest.raises(RefusedError, match="as many as this server takes") as error:
            run.result(DEADLINE)
        refused += error.value.code == "busy"
    for run in runs:
        run.cancel()
    assert refused == 4
    for run in runs[:16]:
        with pytest.raises(CancelledError):
            run.result(DEADLINE)


def test_the_runs_of_a_killed_client_are_cancelled(served: Served, client: Client) -> None:
    program = [sys.executable, str(ROOT / "tests" / "plain_client.py"), served.address]
    before = client.status()
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "accepted\n"
        assert client.status().requests == 1
        killed.kill()
        until(lambda: client.status().requests == 0, "the run of the killed client is cancelled")
    assert client.status().cancelled == before.cancelled + 1
    until(lambda: client.status().clients == 1, "the killed client is forgotten")


def test_memory_for_a_client_that_is_gone_is_given_back(served: Served, client: Client) -> None:
    gone = Plain(served.address)
    gone.open()
    gone.submit(1, labels=[1], steps=2, memory=True)
    gone.hear("Accepted")
    gone.hear("Finished")
    until(lambda: served.memory() == served.idle + 2, "what is left is the result's memory, and its mapping")
    gone.close()
    until(lambda: served.memory() == served.idle, "the memory of the result is closed too")


def test_memory_that_is_not_taken_is_given_back(free: Leader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "ACK_TIMEOUT", 0.1)
    with serving(free, tmp_path) as server:
        plain = Plain(server.address)
        plain.open()
        plain.submit(1, shape=(8, 8), steps=2, memory=True)
        plain.hear("Accepted")
        path = "/proc/{pid}/fd/{fd}".format(**plain.hear("Finished")["samples"]["memory"])
        until(lambda: "drp_untaken_results_total 1" in server.metrics(), "it was given back")
        assert not os.path.exists(path) or "memfd" not in os.readlink(path)  # noqa: PTH110, PTH115  # not files
        plain.close()


def test_a_client_that_does_not_read_is_dropped(free: Leader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "SILENCE_TIMEOUT", 0.2)
    with serving(free, tmp_path, max_requests=1000) as server:
        deaf = Plain(server.address, hwm=1)
        deaf.open()
        for request in range(300):
            deaf.submit(request, shape=(8, 8), count=128, steps=1)
        with Client(server.address) as client:
            until(lambda: client.status().clients == 1, "the client that does not read is forgotten")
            until(lambda: client.status().requests == 0, "and so are its runs")
            assert client.sample(shape=(8, 8), steps=3).rounds == 2
        deaf.close()


def test_a_client_hears_of_a_server_that_is_gone(tmp_path: Path, free: Leader) -> None:
    with serving(free, tmp_path) as server:
        client = Client(server.address)
        run = client.submit(shape=(8, 8), **LONG)
        assert client.status().requests == 1
        server.drain(0.0)
        with pytest.raises(RefusedError, match="the server ended first"):
            run.result(DEADLINE)
    with pytest.raises(ConnectionError):
        until(lambda: client.status() is None, "the connection is closed")
    client.close()
    with pytest.raises(ConnectionError, match=r"no server answers at ipc://.* within 0\.2 s"):
        Client(server.address, timeout=0.2)


# The server's own end, and its health.


def test_a_drain_finishes_what_there_is(free: Leader, tmp_path: Path) -> None:
    with serving(free, tmp_path) as server, Client(server.address) as client:
        run = client.submit(shape=(8, 8), steps=200, progress=True)
        next(run.progress())
        server.drain(DEADLINE)
        with pytest.raises(RefusedError, match="draining"):
            client.sample(shape=(8, 8))
        assert client.status().state == "draining"
        assert torch.equal(run.result(DEADLINE).samples, free.sample(shape=(8, 8), steps=200).samples)


def test_health_is_progress(free: Leader, tmp_path: Path) -> None:
    with serving(free, tmp_path, stall=0.2) as server, Client(server.address) as client:
        assert client.status().healthy
        # So many rounds until the first step is done.
        run = client.submit(shape=(8, 8), steps=80, mode="conservative", drafts=79, sweeps=1000)
        until(lambda: not client.status().healthy, "the server says that nothing goes on")
        assert "no progress of any" in client.status().reason
        assert "drp_healthy 0" in client.metrics()
        run.cancel()
        until(lambda: client.status().healthy, "it is healthy again")


def test_a_run_that_lost_a_worker_says_so(free: Leader, tmp_path: Path) -> None:
    with serving(free, tmp_path) as server, Client(server.address) as client:
        assert client.sample(shape=(8, 8), steps=3).incidents == ()
        run = client.submit(shape=(8, 8), steps=900, sweeps=1, progress=True)
        next(run.progress())
        pid = free.workers[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        incident, *_ = run.result(DEADLINE).incidents
        assert incident.startswith(f"worker 1 (cpu:1, process {pid}) was killed by SIGKILL")


def test_the_longest_result_is_a_message() -> None:
    high = range(2**31 - 10_000, 2**31)
    longest = Result(
        samples=torch.zeros(1),
        mode="𝄞" * 200,
        drafts=2**31 - 1,
        steps=2**31 - 1,
        devices=("𝄞" * 200,) * 256,
        rounds=2**31 - 1,
        evaluations=2**31 - 1,
        seconds=1.0,
        device_seconds=1.0,
        residuals=dict.fromkeys(high, 0.1),
        cuts=tuple(high),
        incidents=("𝄞" * 3000,) * 100,
    )
    message = finished(2**31 - 1, longest, TensorData("float32", (1,), frame=1), 1.0)
    assert message.incidents == (*["𝄞" * 2000] * 63, "and 37 more")
    assert decode(encode(message), client_messages.TO_CLIENT) == message


def test_a_lost_leader_ends_the_server(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack, Leader("tests.denoisers:Tiny") as leader:
        server = stack.enter_context(serving(leader, tmp_path))
        client = stack.enter_context(Client(server.address))
        run = client.submit(labels=[1], **LONG, progress=True)
        next(run.progress())
        leader.close()
        with pytest.raises(RefusedError, match="the server ended first"):
            run.result(DEADLINE)
        with pytest.raises(WorkerError, match="all clients were notified"):
            stack.close()


# Who may come in.


def test_only_the_owner_may_come_in(served: Served, free: Leader, tmp_path: Path) -> None:
    path = Path(served.address.removeprefix("ipc://"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ValueError, match="another server listens"):
        Server(free, "model", served.address)
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    for address, message in (
        (f"ipc://{open_to_all}/door", "name a directory of mode 0700"),
        (f"ipc://{tmp_path}/{'d' * 100}", "at most 107 characters"),
        ("tcp://127.0.0.1:*", "with keys, which `drp keys` makes"),
        ("inproc://door", "give ipc://PATH"),
    ):
        with pytest.raises(ValueError, match=message):
            Server(free, "model", address)
    with Client(served.address) as client:
        assert client.status().healthy  # It was not disturbed.


def test_tcp_lets_known_keys_in(free: Leader, tmp_path: Path) -> None:
    made = make(tmp_path / "keys", ["known"])
    assert all(path.stat().st_mode & 0o077 == 0 for path in made)
    assert make(tmp_path / "keys", ["known"]) == []
    make(tmp_path / "others", ["stranger"])
    own, other = tmp_path / "keys", tmp_path / "others"
    with serving(free, tmp_path, address="tcp://127.0.0.1:*", keys=Keys.read(own)) as server:
        with Client(server.address, server_key=own / "server.key", key=own / "clients" / "known.key_secret") as client:
            large = client.sample(shape=(8, 8), count=2000, steps=2).samples
            assert torch.equal(large, free.sample(shape=(8, 8), count=2000, steps=2).samples)
        with pytest.raises(ConnectionError):
            Client(
                server.address, server_key=own / "server.key", key=other / "clients" / "stranger.key_secret", timeout=5
            )
        with pytest.raises(ConnectionError):
            Client(
                server.address,
                server_key=other / "server.key",
                key=own / "clients" / "known.key_secret",
                timeout=0.5,
            )
        bare = Plain(server.address)
        bare.say("Open", version=3, name="without keys")
        assert not bare.socket.poll(300)
        bare.close()
        with pytest.raises(ValueError, match="with server_key and key"):
            Client(server.address)


def test_commands_say_plainly_what_cannot_be(tmp_path: Path) -> None:
    for arguments, message in (
        (["serve", "--listen", "tcp://127.0.0.1:*"], "with keys, which `drp keys` makes"),
        (["serve", "--keys", str(tmp_path)], "`drp keys` makes them"),
        (["serve", "-l", f"ipc://{tmp_path}/door/socket", "--trace", f"{tmp_path}/no/run.json"], "cannot be written"),
        (["keys", str(tmp_path / "keys"), "../anna"], "a name has letters"),
        (["http", "--trace", "run.json"], "drp serve --trace FILE"),
    ):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 1
        assert message in done.output
