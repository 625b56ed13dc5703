"""`drp serve` as a process, or in a thread where a test replaces a part: samples, options, progress and status."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

import drp
from drp import Client, Leader
from drp.cli import main
from drp.errors import ProtocolError
from drp.leader.runs.submission import RunFuture
from drp.protocol import client_messages
from drp.protocol.arrays import Library, open_array
from drp.protocol.client_messages import TensorData
from drp.protocol.codec import decode, encode
from drp.protocol.handles import Handle
from drp.sampling.drafts import PAPER, DraftRule
from drp.sampling.modes import Sequential
from drp.sampling.result import Result
from drp.server.options import finished
from drp.server.server_request import ServerRequest
from tests.serving import DEADLINE, LONG, Served, serving
from tests.waiting import until


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
    {"solver": "dpmsolver++", "solver_options": {"order": 3}, "grid": {"sigmas": "karras"}},
    {"mode": "adaptive", "tolerance": float("inf")},
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
    request = ServerRequest(b"", client_messages.Submit(1, previews=4), lambda request: None, lambda: None)
    request.future = RunFuture(lambda: None)
    updates: list[client_messages.Progress] = []

    class Slow(torch.Tensor):
        def cpu(self, *_: object, **__: object) -> torch.Tensor:
            updates.extend(progress for progress, _ in request.updates(lambda request, limit: ()))
            return torch.ones(2)

    for step in range(1, 13):
        request.on_step(step, torch.zeros(2).as_subclass(Slow))
    updates.extend(progress for progress, _ in request.updates(lambda request, limit: ()))
    assert [progress.step for progress in updates if progress.preview is not None] == [4, 8, 12]
    assert [progress.step for progress in updates] == sorted(progress.step for progress in updates)


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
