"""The simulator: what can be said without it, it says too."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from drp.cli import main
from drp.leader import LeaderOptions
from drp.leader.events import Timeline
from drp.leader.scheduling.policies import POLICIES, Barrier, LoadAdaptive, Policy
from drp.sampling.drafts import DAMPED
from drp.sampling.grids import scaled_linear
from drp.sampling.mode_selection import make_mode
from drp.sampling.mode_wrappers import EagerRounds, PicardSweeps, Warmup
from drp.sampling.modes import Aggressive, Conservative, Mode, Rolling, Sequential
from drp.sampling.reference import run_reference
from drp.sampling.solvers import DDIM
from drp.simulate import Costs, Link, Workload, make_devices, simulate
from drp.simulate.devices import repeated
from drp.trace import summarise, write
from tests.integration.test_trace import check_format, names

STEADY = "8xemulated:20ms"


@pytest.mark.parametrize(
    "mode",
    [
        Sequential(),
        Aggressive(8),
        Conservative(4),
        Rolling(8),
        Rolling(3),
        Warmup(Aggressive(5), 3),
        PicardSweeps(Aggressive(4), 2),
        EagerRounds(PicardSweeps(Aggressive(4), 2)),
    ],
)
def test_without_costs_a_run_takes_its_rounds(mode: Mode) -> None:
    outcome = simulate(make_devices(STEADY), Barrier(), Workload(mode, 48, 3))
    start = torch.zeros(1, 2)
    reference = run_reference(lambda x, t, cond: x, DDIM(scaled_linear(48)), mode, start, {})
    for run in outcome.runs:
        assert run.schedule.depth == reference.rounds
        assert run.evaluations == reference.evaluations
        assert run.seconds == pytest.approx(0.02 * reference.rounds)


def test_adaptive_goes_by_how_stale_drafts_are() -> None:
    def depth(tolerance: float) -> int:
        load = Workload(make_mode("adaptive", 8, tolerance, DAMPED), 48, 1)
        return simulate(make_devices(STEADY), Barrier(), load).runs[0].schedule.depth

    assert depth(0.0) == 48
    assert depth(1.0) == 7
    assert 7 < depth(1e-3) < 48


def test_given_costs_are_found_again_in_the_trace() -> None:
    given = Costs(
        start=(3e-4,),
        send_first=(1e-4,),
        send_more=(2e-5,),
        down=((4e-4,), (5e-4,), (6e-4,), (7e-4,)),
        wake_long=(5e-4,),
        wake_short=(5e-4,),
        receive_first=(1e-4,),
        receive_more=(3e-5,),
        head_start=5e-4,
        end=(2e-4,),
        late=(6e-5,),
    )
    marks = Timeline()
    devices = make_devices("4xemulated:20ms")
    simulate(devices, Barrier(), Workload(Aggressive(4), 48, 8), given, timeline=marks)
    found = Costs.measured(marks, ["emulated:20ms"] * 4)
    for name in ("start", "send_first", "send_more", "wake_long", "end", "late", "receive_first"):
        assert statistics.median(getattr(found, name)) == pytest.approx(getattr(given, name)[0], abs=2e-9), name
    assert [statistics.median(samples) for samples in found.down] == pytest.approx([4e-4, 5e-4, 6e-4, 7e-4], abs=2e-9)
    again = simulate(devices, Barrier(), Workload(Aggressive(4), 48, 8), found)
    first = simulate(devices, Barrier(), Workload(Aggressive(4), 48, 8), given)
    assert again.median == pytest.approx(first.median, rel=1e-3)
    assert first.median == pytest.approx(13 * 0.02, rel=0.1)
    assert first.median > 13 * 0.02


def test_asynchronous_runs_wait_for_no_message() -> None:
    devices, load = make_devices("4xemulated:20ms"), Workload(Aggressive(4), 48, 2)
    sync, ahead = (
        simulate(devices, Barrier(), load, Costs.constant(1e-4, 1e-5, 2e-4, dispatch)) for dispatch in ("sync", "async")
    )
    rounds, least = 13, 2e-4 + 5 * 1e-5  # the leader wakes up, adds a prediction and computes four drafts
    assert ahead.median == pytest.approx(rounds * (0.02 + least), rel=2e-3)
    assert sync.median > ahead.median + rounds * 5e-4  # four messages out, one back, and a worker wakes up


def test_costs_of_asynchronous_runs_are_found_again_in_their_trace() -> None:
    given = Costs(start=(3e-4,), down=((4e-4,),), following=(1e-4,), end=(2e-4,), late=(6e-5,))
    devices = make_devices("2xemulated:20ms:link=1ms")
    marks, load = Timeline(), Workload(Aggressive(4), 48, 8)
    first = simulate(devices, Barrier(), load, given, timeline=marks)
    found = Costs.measured(marks, ["emulated:20ms:link=1ms"] * 2, "async")
    for name in ("start", "following", "end", "late"):
        assert statistics.median(getattr(found, name)) == pytest.approx(getattr(given, name)[0], abs=2e-8), name
    assert statistics.median(found.down[0]) == pytest.approx(4e-4, abs=2e-8)
    assert simulate(devices, Barrier(), load, found).median == pytest.approx(first.median, rel=1e-3)


def lost(policy: Policy, n: int, steps: int) -> float:
    """Return what straggling costs, on average over which of 8 devices does."""
    whole = simulate(make_devices(STEADY), policy, Workload(Aggressive(n), steps, 1)).mean
    late = []
    for which in range(8):
        devices = ["emulated:20ms"] * 8
        devices[which] += ":straggler=3x@5%"
        late.append(simulate(make_devices(devices), policy, Workload(Aggressive(n), steps, 40)).mean - whole)
    return statistics.mean(late)


def test_a_hedged_window_loses_less_than_half_of_what_a_barrier_loses() -> None:
    assert lost(POLICIES["rolling-hedged"], 8, 50) < 0.5 * lost(POLICIES["barrier"], 8, 50)
    assert lost(POLICIES["rolling-hedged"], 8, 48) < 0.7 * lost(POLICIES["barrier"], 8, 48)


def test_a_window_waits_less_for_jitter_than_a_barrier() -> None:
    devices = make_devices("8xemulated:20ms:jitter=10%")
    barrier, eager, rolling = (
        simulate(devices, POLICIES[name], Workload(Aggressive(8), 48, 100)) for name in ("barrier", "eager", "rolling")
    )
    assert 0.140 < rolling.mean < barrier.mean == eager.mean
    assert rolling.utilisation > barrier.utilisation


@pytest.mark.parametrize("distribution", ["normal", "lognormal", "exponential"])
def test_distributions_have_the_mean_and_the_deviation_that_is_said(distribution: str) -> None:
    (device,) = make_devices("emulated:20ms:jitter=20%", distribution)
    draws = random.Random(1)
    times = [device.seconds(run, 0, draws) for run in range(20_000)]
    assert statistics.mean(times) == pytest.approx(0.02, rel=0.01)
    assert statistics.stdev(times) == pytest.approx(0.004, rel=0.05)
    assert min(times) >= 0


def test_measured_times_are_drawn_as_they_were() -> None:
    device = replace(make_devices("emulated:20ms")[0], distribution="measured", measured=(0.1, 0.3))
    draws = random.Random(0)
    assert {device.seconds(0, k, draws) for k in range(50)} == {0.1, 0.3}


def test_load() -> None:
    devices = make_devices(STEADY)
    most = 8 / (48 * 0.02)
    calm = simulate(devices, LoadAdaptive(), Workload(Aggressive(8), 48, 200, rate=0.2 * most))
    busy = simulate(devices, LoadAdaptive(), Workload(Aggressive(8), 48, 200, rate=3 * most))
    spread = simulate(devices, Barrier(), Workload(Aggressive(8), 48, 200, rate=3 * most))
    assert calm.latency(50) < 0.2 < busy.latency(50)
    assert calm.throughput == pytest.approx(0.2 * most, rel=0.2)
    assert busy.throughput == pytest.approx(most, rel=0.05)
    assert spread.throughput <= most
    assert busy.utilisation > 0.95 > calm.utilisation
    assert busy.cost(2.0) == pytest.approx(2.0 * 8 / 3600 / busy.throughput)
    users = simulate(devices, LoadAdaptive(), Workload(Aggressive(8), 48, 50, users=4))
    assert len(users.runs) == 50
    assert 1 / users.median * 4 == pytest.approx(users.throughput, rel=0.1)


@pytest.mark.parametrize("name", POLICIES)
def test_failures_cost_time_and_lose_nothing(name: str) -> None:
    devices = [replace(device, mtbf=3.0, restart=0.5) for device in make_devices(STEADY)]
    outcome = simulate(devices, POLICIES[name], Workload(Aggressive(8), 48, 60), Costs.constant(5e-5, 1e-5, 1e-4))
    assert outcome.lost > 5
    assert len(outcome.runs) == 60
    assert all(run.evaluations == 48 for run in outcome.runs)
    assert outcome.mean > 0.14


def test_a_thousand_devices() -> None:
    devices = repeated(make_devices("emulated:20ms:jitter=10%"), 1024)
    outcome = simulate(devices, POLICIES["rolling"], Workload(Rolling(64), 200, 2, users=2))
    assert len(outcome.runs) == 2
    with pytest.raises(ValueError, match="1 to 1024"):
        repeated(devices, 1025)


def test_the_same_seed_gives_the_same_and_every_trace_is_valid(tmp_path: Path) -> None:
    devices = [
        replace(d, mtbf=2.0, restart=0.3) for d in make_devices("4xemulated:20ms:jitter=30%:link=1ms", "lognormal")
    ]
    for name, policy in POLICIES.items():
        marks, again = Timeline(), Timeline()
        for timeline in (marks, again):
            simulate(
                devices, policy, Workload(Aggressive(6), 20, 5), Costs.constant(5e-5, 1e-5, 1e-4), 7, timeline=timeline
            )
        assert marks == again
        write(tmp_path / "run.json", marks, ["simulated"] * 4)
        assert names(check_format(tmp_path / "run.json"), "X").count("last states") == 5
        for path in summarise(marks, ["simulated"] * 4).paths:
            parts = path.compute + path.transfer + path.arithmetic + path.sending + path.queue + path.end
            assert parts == pytest.approx(path.wall), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "cpu:0"], "device 'cpu:0' cannot be simulated"),
        (["-d", "2000xemulated:20ms"], "more than 1024 devices"),
        (["--distribution", "flat"], "'flat' is not one of 'normal'"),
        (["--policy", "fast"], "unknown policy 'fast'"),
        (["--policy", "hedged", "--dispatch", "async"], "policy 'hedged' hedges, which needs synchronous dispatch"),
        (["--mode", "fast"], "'fast' is not one of"),
        (["--runs", "0"], "0 is not in the range"),
        (["--message", "fast"], "'fast' is not a time"),
        (["--mtbf=-1"], "-1.0 is not in the range"),
    ],
)
def test_bad_input_is_a_line(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["simulate", *arguments])
    assert done.exit_code in (1, 2)
    assert message in done.output


def test_the_command_line(tmp_path: Path) -> None:
    trace = str(tmp_path / "run.json")
    asked = ["-d", "8xemulated:20ms", "--policy", "barrier,rolling", "--runs", "5", "--best", "--price", "2"]
    done = CliRunner().invoke(main, ["simulate", *asked, "--trace", trace])
    assert done.exit_code == 0, done.output
    assert "least latency: 8 device(s)" in done.output
    check_format(Path(trace))
    again = CliRunner().invoke(main, ["simulate", "--from", trace, "-d", "4xemulated:20ms", "--runs", "5"])
    assert again.exit_code == 0, again.output
    assert str(LeaderOptions().policy) in again.output  # the default of both
    assert "5 simulated runs of 48 steps" in again.output
    shown = json.loads(CliRunner().invoke(main, ["simulate", *asked, "--json"]).stdout)
    assert {(row["policy"], row["mode"]) for row in shown["rows"]} == {("barrier", "window"), ("rolling", "rolling")}
    assert [(row["policy"], row["devices"]) for row in shown["rows"]] == [
        (policy, count) for policy in ("barrier", "rolling") for count in (1, 2, 4, 8)
    ]
    least = min(shown["rows"], key=lambda row: row["latency_p50_seconds"])
    assert shown["best"] == {"policy": least["policy"], "devices": least["devices"]}
    assert all(row["cost_per_run"] > 0 for row in shown["rows"])


@pytest.mark.parametrize("io_threads", [1, 4])
def test_a_link_is_shared_by_all_drafts_of_a_round_and_encrypted_by_the_leaders_threads(io_threads: int) -> None:
    nbytes, latency, bandwidth, encryption = 1 << 18, 0.001, 1e9, 7e8
    wire, core = nbytes / bandwidth, nbytes / encryption
    link = Link(nbytes, latency, bandwidth, encryption, io_threads)
    for n in (1, 4, 8):
        seconds = simulate(
            make_devices(f"{n}xemulated:20ms"), Barrier(), Workload(Aggressive(n), 1 + 4 * n, 1), link=link
        ).median
        # The last draft of a round waits for its thread and for the wire; all devices take the same time, and the
        # predictions come back in the order of the drafts, so that only the last one's own way is added.
        turns = -(-n // io_threads)
        one = 0.02 + 2 * latency + 2 * wire + 4 * core
        last = 0.02 + 2 * latency + 2 * core + max(turns * core + wire, core + n * wire) + wire + core
        assert seconds >= one + 4 * (one if n == 1 else last) - 1e-9
        assert seconds <= one + 4 * (last + n * wire) + 1e-9


def test_a_link_without_limits_costs_its_latency_alone() -> None:
    def time(link: Link | None) -> float:
        return simulate(make_devices(STEADY), Barrier(), Workload(Aggressive(8), 49, 1), link=link).median

    assert time(Link()) == time(None)
    rounds = 1 + 6
    assert time(Link(1 << 20, latency=0.1)) == pytest.approx(time(None) + rounds * 0.2)


def test_the_command_line_takes_a_link(tmp_path: Path) -> None:
    arguments = ["simulate", "-d", STEADY, "-m", "aggressive", "-r", "1", "-n", "49", "--json"]
    arguments += ["--message", "0us", "--row", "0us", "--wake", "0us"]

    def run(*more: str) -> tuple[str, float]:
        result = CliRunner().invoke(main, [*arguments, *more])
        assert result.exit_code == 0, result.output
        (row,) = json.loads(result.output)["rows"]
        return row["dispatch"], row["median_seconds"]

    link = Link(1 << 18, 0.0002, 1e9, 7.3e8)
    load = Workload(Aggressive(8), 49, 1)
    costs = Costs.constant(0.0, 0.0, 0.0)
    expected = simulate(make_devices(STEADY), LoadAdaptive(hedge=None), load, costs, link=link).median
    dispatch, seconds = run("--link", "200us@1GB/s", "--latent", "256KiB", "--encryption", "730MB/s")
    assert dispatch == "sync"
    assert seconds == pytest.approx(expected)
    for wrong, words in (
        (["--link", "fast"], "'fast' is not a time"),
        (["--link", "1ms@fast"], "'fast' is not a rate above 0; write 10GB/s, 500MB/s or 100KB/s"),
        (["--link", "1ms", "--latent", "64KB"], "'64KB' is not a size; write 64KiB, 8MiB or 1GiB"),
        (["--encryption", "1GB/s"], "there is no link; give --link"),
        (["--link", "1ms", "--dispatch", "async"], "workers on other machines are sent drafts synchronously"),
    ):
        result = CliRunner().invoke(main, [*arguments, *wrong])
        assert result.exit_code != 0
        assert words in result.output
