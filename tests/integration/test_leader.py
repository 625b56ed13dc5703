"""Leader and workers, real ones: the same bits as the reference, and what users are promised around it."""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

import drp
from drp import Leader
from drp.leader.devices import parse_devices
from drp.leader.job import make_job
from drp.leader.request import Request
from examples.own_mode import Growing
from tests.denoisers import make_free

TINY = "tests.denoisers:Tiny"
MODES = ("sequential", "conservative", "aggressive", "window", "rolling")


@pytest.mark.parametrize("workers", [1, 2])
def test_bits_equal_the_reference(one: Leader, tiny: Leader, workers: int) -> None:
    """With three workers, see the policies."""
    leader = one if workers == 1 else tiny
    for mode, (seed, batch), steps in itertools.product(MODES, ((0, 1), (11, 3)), (1, 2, 10, 13)):
        labels = list(range(batch))
        run = leader.sample(labels=labels, mode=mode, seed=seed, steps=steps)
        ref = drp.reference(TINY, labels=labels, mode=mode, seed=seed, steps=steps, devices=workers)
        assert torch.equal(run.samples, ref.samples), (mode, seed, batch, steps)
        assert (run.rounds, run.evaluations) == (ref.rounds, ref.evaluations)


def test_samples_depend_on_drafts_not_on_devices(one: Leader, tiny: Leader) -> None:
    for drafts in (1, 2, 3, 5):
        results = [each.sample(labels=[1, 2], steps=12, drafts=drafts).samples for each in (one, tiny)]
        assert torch.equal(*results)


def test_workers_equal_the_reference_whatever_is_asked(free: Leader) -> None:
    asked: list[dict[str, Any]] = [
        {"mode": "adaptive", "tolerance": 0.003},
        {"mode": "adaptive", "tolerance": 0.003, "solver": "unipc", "warmup": 2, "sweeps": 1},
        {"mode": "aggressive", "solver": "ddpm", "rule": "paper"},
        {"mode": "conservative", "solver": "sde-dpmsolver++", "prediction_type": "v"},
        {"mode": "aggressive", "solver": "lms", "prediction_type": "v", "residuals": True},
        {"mode": Growing(3), "solver": "dpmsolver++"},
        {"stride": 2},
        {"offsets": "even", "solver": "unipc", "stride": 2.5},
        {"offsets": "tapered", "solver": "ddpm"},
    ]
    for options in asked:
        drafts = {} if isinstance(options.get("mode"), Growing) else {"drafts": 3}
        common = {"count": 2, "shape": (4, 4), "steps": 17, **drafts, **options}
        result, expected = free.sample(**common), drp.reference(make_free, **common)
        assert torch.equal(result.samples, expected.samples), options
        assert (result.rounds, result.evaluations) == (expected.rounds, expected.evaluations)
        assert result.residuals == expected.residuals
        assert result.cuts == expected.cuts
        assert result.evaluated == expected.evaluated
        assert sum(result.evaluated) == result.evaluations
        if "residuals" in options:
            assert sorted(result.residuals) == list(range(1, 17))


def test_the_programs_own_random_numbers_are_left_alone(tiny: Leader) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tiny.sample(labels=[1], steps=4, solver="euler-ancestral")
    assert torch.equal(torch.get_rng_state(), before)
    drp.reference(TINY, labels=[1], steps=4, solver="euler-ancestral")  # its layers draw weights as they are made
    assert torch.equal(torch.get_rng_state(), before)


def test_counts_equal_the_formulas(tiny: Leader) -> None:
    for drafts, aggressive, conservative in ((2, 25, 32), (4, 13, 20), (8, 7, 12), (60, 2, 2)):
        fast = tiny.sample(labels=[0], mode="aggressive", drafts=drafts)
        safe = tiny.sample(labels=[0], mode="conservative", drafts=drafts)
        assert (fast.rounds, safe.rounds) == (aggressive, conservative)
        assert fast.evaluations == safe.evaluations == 48
        assert fast.theory == 48 / aggressive
        window = tiny.sample(labels=[0], drafts=drafts)
        assert (window.rounds, window.mode) == (1 + math.ceil(47 / (drafts / 2 + 1)), "window")
        assert sum(window.evaluated) == window.evaluations > 48 * (drafts > 2)


def test_a_sample_does_not_depend_on_its_neighbours(tiny: Leader) -> None:
    one = tiny.sample(labels=[4], steps=6).samples
    two = tiny.sample(labels=[4, 5], steps=6).samples
    torch.testing.assert_close(two[:1], one)


@pytest.mark.parametrize("mode", ["sequential", "aggressive"])
def test_noise_is_read_and_samples_are_written_where_they_lie(tiny: Leader, mode: str) -> None:
    noise, out = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.zeros(2, 1, 8, 8)
    job = make_job(Request(labels=[1, 2], noise=noise, out=out), tiny.spec, 2)
    assert job.start.data_ptr() == noise.data_ptr()
    before, place = noise.clone(), out.data_ptr()
    run = tiny.sample(labels=[1, 2], noise=noise, out=out, steps=9, mode=mode)
    ref = drp.reference(TINY, labels=[1, 2], noise=noise, steps=9, mode=mode, devices=2)
    assert run.samples is out
    assert out.data_ptr() == place
    assert torch.equal(out, ref.samples)
    assert torch.equal(noise, before)
    same = torch.zeros_like(out)
    assert drp.reference(TINY, labels=[1, 2], noise=noise, out=same, steps=9, mode=mode, devices=2).samples is same
    assert torch.equal(same, out)


def test_noise_equal_to_the_seeds_changes_nothing(tiny: Leader) -> None:
    karras = {"sigmas": "karras"}  # whose first state is the noise times its first level
    seeded = make_job(Request(seed=4, labels=[1, 2]), tiny.spec, 2).start
    given = tiny.sample(labels=[1, 2], steps=9, solver="dpmsolver++", grid=karras, noise=seeded).samples
    assert torch.equal(given, tiny.sample(labels=[1, 2], steps=9, solver="dpmsolver++", grid=karras, seed=4).samples)


def test_samples_are_written_into_an_inference_tensor(tiny: Leader) -> None:
    with torch.inference_mode():
        out = torch.zeros(1, 1, 8, 8)
    assert torch.equal(tiny.sample(labels=[1], steps=4, out=out).samples, tiny.sample(labels=[1], steps=4).samples)


def test_callback_sees_every_step_in_order(tiny: Leader) -> None:
    seen: list[tuple[int, Tensor]] = []
    result = tiny.sample(labels=[1], steps=9, callback=lambda k, x: seen.append((k, x.clone())))
    assert [k for k, _ in seen] == list(range(1, 10))
    assert torch.equal(seen[-1][1], result.samples)


def test_a_callback_that_raises_ends_the_run_not_the_leader(tiny: Leader) -> None:
    before = tiny.sample(labels=[1], steps=9).samples

    def raise_at_5(k: int, x: Tensor) -> None:
        if k == 5:
            raise KeyError("enough")

    for _ in range(3):
        with pytest.raises(KeyError, match="enough"):
            tiny.sample(labels=[2], steps=9, callback=raise_at_5)
        assert torch.equal(tiny.sample(labels=[1], steps=9).samples, before)


def test_a_callback_that_calls_its_leader_is_refused(tiny: Leader) -> None:
    with pytest.raises(RuntimeError, match="must not use the leader"):
        tiny.sample(labels=[1], steps=3, callback=lambda k, x: tiny.close())


def test_threads_are_served_in_turn(tiny: Leader) -> None:
    results: dict[int, Tensor] = {}

    def run(seed: int) -> None:
        results[seed] = tiny.sample(labels=[1], steps=9, seed=seed).samples

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for seed in range(4):
        assert torch.equal(results[seed], tiny.sample(labels=[1], steps=9, seed=seed).samples)


def test_a_model_of_ones_own_with_conditions() -> None:
    shift = torch.linspace(0, 1, 12).view(3, 4)
    with Leader(make_free) as leader:
        run = leader.sample(shape=(3, 4), count=2, cond={"shift": shift}, steps=7)
        bare = leader.sample(shape=(5,), steps=7)
    ref = drp.reference(make_free, shape=(3, 4), count=2, cond={"shift": shift}, steps=7)
    assert run.samples.shape == (2, 3, 4)
    assert torch.equal(run.samples, ref.samples)
    assert bare.samples.shape == (1, 5)


def test_one_copy_of_the_weights(tiny: Leader) -> None:
    def shared_by(pid: int) -> set[str]:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {line.split()[4] for line in lines if "memfd:drp" in line}

    first, second = (worker.pid for worker in tiny.workers)
    assert first is not None
    assert second is not None
    assert shared_by(first) & shared_by(second), "no memory with the same inode in both workers"
    # And it is what they use: weights that differ in each process end up as those of the first.
    with Leader("tests.denoisers:make_varying", devices=2) as leader:
        runs = [leader.sample(steps=7, drafts=drafts, mode="sequential").samples for drafts in (1, 2)]
        one = leader.sample(steps=7, drafts=3).samples
        again = leader.sample(steps=7, drafts=3).samples
    assert torch.equal(*runs)
    assert torch.equal(one, again)
    assert not torch.equal(drp.reference("tests.denoisers:make_varying", steps=7, drafts=3).samples, one)


def test_workers_are_pinned_with_one_thread_each(tiny: Leader) -> None:
    cores = sorted(os.sched_getaffinity(0))
    for turn, worker in enumerate(tiny.workers):
        assert psutil.Process(worker.pid).cpu_affinity() == [cores[turn % len(cores)]]


def test_leaders_side_by_side_of_which_one_is_closed_twice(tiny: Leader) -> None:
    """The other's thread has one torch thread, whatever the program has, whose threads keep theirs."""
    first = tiny.sample(labels=[3], steps=8).samples
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    counts: dict[str, int] = {}
    try:
        other = Leader(TINY, devices=1)
        run = other.sample(
            labels=[3], steps=8, drafts=2, callback=lambda k, x: counts.update(leader=torch.get_num_threads())
        )
        counts["caller"] = torch.get_num_threads()
        thread = threading.Thread(target=lambda: counts.update(new=torch.get_num_threads()))
        thread.start()
        thread.join(5)
    finally:
        torch.set_num_threads(before)
    assert counts == {"leader": 1, "caller": 2, "new": 2}
    assert torch.equal(run.samples, first)
    other.close()
    other.close()
    with pytest.raises(RuntimeError, match="closed; make a new one"):
        other.sample(labels=[3])
    assert torch.equal(tiny.sample(labels=[3], steps=8).samples, first)


def test_the_leader_changes_no_setting_of_its_process(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def settings() -> tuple[object, ...]:
        import multiprocessing
        import signal

        handlers = tuple(signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD))
        return torch.get_num_threads(), multiprocessing.get_start_method(allow_none=True), handlers, dict(os.environ)

    before = settings()
    with caplog.at_level(logging.INFO):
        result = drp.sample(TINY, labels=[1], devices=1, drafts=2, steps=4)
        reference = drp.reference(TINY, labels=[1], drafts=2, steps=4)
    assert torch.equal(result.samples, reference.samples)
    assert settings() == before
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


BAD: list[tuple[dict[str, object], str]] = [
    ({"mode": "fast"}, "unknown mode 'fast'"),
    ({"steps": 0}, "steps is 0"),
    ({"steps": 1001}, "steps is 1001"),
    ({"steps": 4.0}, r"steps is 4\.0"),
    ({"labels": [1, 10]}, "label 10 is out of range; this model has the classes 0 to 9"),
    ({"labels": [-1]}, "label -1 is out of range"),
    ({"labels": []}, "labels"),
    ({"labels": [0.5]}, "whole numbers"),
    ({"labels": ["x"]}, "whole numbers"),
    ({"labels": None}, "labels are missing"),
    ({"count": 3}, "count is 3, but there are 1 labels"),
    ({"shape": (2, 8, 8)}, "shape is"),
    ({"drafts": 0}, "drafts is 0"),
    ({"drafts": 100_000}, "drafts is 100000; give a whole number, 1 to 256"),
    ({"seed": -1}, "seed is -1"),
    ({"guidance": float("nan")}, "guidance is nan"),
    ({"noise": [1.0]}, "noise is a list; give a tensor"),
    ({"noise": torch.zeros(1, 8)}, r"noise is torch.float32 \[1, 8\] on cpu; give torch.float32 \[1, 1, "),
    ({"noise": torch.zeros(1, 1, 8, 8).double()}, r"noise is torch.float64 \["),
    ({"out": torch.zeros(1, 1, 1, 1).expand(1, 1, 8, 8)}, "out is .*, not contiguous; give torch.float32"),
    ({"cond": {"labels": torch.zeros(1)}}, "is a separate argument"),
    ({"cond": {"x": 3}}, "cond holds tensors"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_options_are_refused(tiny: Leader, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.sample(**{"labels": [1], "steps": 4, **change})  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_options_are_refused_before_any_worker_starts(
    change: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "shape" not in change:
        monkeypatch.setattr(
            "drp.leader.supervision.worker_pool.WorkerPool.spawn", None
        )  # starting one would be a TypeError
        with pytest.raises(ValueError, match=message):
            drp.sample("digits", **{"labels": [1], **change})  # type: ignore[arg-type]  # wrong on purpose


def test_unknown_options_are_refused(tiny: Leader) -> None:
    with pytest.raises(TypeError, match="step"):
        tiny.sample(labels=[1], step=4)  # type: ignore[call-arg]  # wrong on purpose


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (0, "devices is 0"),
        (-1, "devices is -1"),
        (257, "devices is 257"),
        (True, "devices is True"),
        (1.5, r"devices is 1\.5"),
        ([], "0 devices"),
        ("gpu", "device 'gpu' does not exist"),
        ("tpu:0", "device 'tpu:0' does not exist"),
        ("cpu:4000", "device 'cpu:4000' does not exist"),
        (["cpu:0", "cpu:x"], "'cpu:x' does not exist"),
        (["cpu:0", 1], "devices holds 1"),
        ("", "device '' does not exist"),
    ],
)
def test_devices_that_cannot_be(devices: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drp.sample("digits", labels=[1], devices=devices)  # type: ignore[arg-type]  # wrong on purpose


def test_device_names() -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert [d.cores for d in parse_devices(["cpu:0", "cpu:0"], 1)] == [(cores[0],)] * 2
    assert [d.name for d in parse_devices("cpu, cpu:0", 1)] == ["cpu:0", "cpu:0"]
    assert len(parse_devices("3", 1)) == len(parse_devices(3, 1)) == 3
    assert parse_devices(1, 100)[0].cores == tuple(cores)
    with pytest.raises(ValueError, match="threads is 0"):
        parse_devices(1, 0)


@pytest.mark.parametrize("model", ["digitz", "digits.safetensors", "a:", ":b", ""])
def test_a_model_name_that_cannot_be(model: str) -> None:
    with pytest.raises(ValueError, match="built in: digits"):
        drp.sample(model, labels=[1])


def test_a_factory_that_no_worker_can_import() -> None:
    with pytest.raises(ValueError, match="cannot be imported by a worker"):
        drp.sample(lambda: make_free, shape=(3,))
    with pytest.raises(ValueError, match="start_timeout is 0"):
        Leader(TINY, start_timeout=0)
