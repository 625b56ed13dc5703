"""`drp tune`: predictions that follow from what was measured, and what is said of other devices."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

import drp
from drp.cli import main
from drp.cli.tune import tables
from drp.comparison import calibration
from drp.comparison.calibration import Calibration, RoundTime, round_seconds
from drp.comparison.choose import implausible
from drp.comparison.models import ModelSubject
from drp.comparison.settings import Drafted
from drp.comparison.subject import Sample, SubjectSession
from drp.comparison.tuning import Candidate, Tuning, _advice, tune
from drp.diffusers.comparison import PipelineSubject
from drp.diffusers.digits import digits_pipeline
from drp.leader import LeaderOptions

STEPS, DEVICES = 13, 4
pytestmark = [
    pytest.mark.timeout(300),  # Many runs are measured, and a machine may be busy with other things.
]


@pytest.fixture(scope="module")
def tuning() -> Tuning:
    return tune(ModelSubject("digits", LeaderOptions(devices=f"{DEVICES}xemulated:4ms"), steps=STEPS))


@pytest.mark.reports
def test_predictions_are_the_rounds_with_what_was_measured(tuning: Tuning) -> None:
    found = tuning.calibration
    assert list(found.rounds) == [1, 2, 4]
    # An emulated device takes that at least.
    assert all(took.slowest >= 0.004 for took in found.rounds.values())
    assert len(found.memory) == DEVICES
    assert min(found.memory.values()) > 2**20
    assert found.batches == {}  # emulated devices take the same time for batches of any size
    settings = {(c.setting.mode, c.setting.drafts) for c in tuning.candidates}
    assert settings == {(mode, n) for mode in ("window", "aggressive", "conservative") for n in (2, 3, 4)}
    for candidate in tuning.candidates:
        rounds = list(candidate.setting.make_mode().rounds(STEPS))
        assert candidate.rounds == len(rounds)
        expected = sum(found.seconds(len(r.predict)) for r in rounds)
        assert candidate.predicted == pytest.approx(found.fixed + expected)


@pytest.mark.reports
def test_the_best_of_each_mode_is_tried(tuning: Tuning) -> None:
    tried = [c for c in tuning.candidates if c.measured is not None]
    assert {c.setting.mode for c in tried} == {"window", "aggressive", "conservative"}
    for candidate in tried:
        same_mode = [c.predicted for c in tuning.candidates if c.setting.mode == candidate.setting.mode]
        assert candidate.predicted == min(same_mode)
        assert candidate.distance is not None
        assert candidate.speedup is not None
        assert candidate.error == pytest.approx(candidate.predicted / (candidate.measured or 1) - 1)
    assert tuning.best in tried
    assert tuning.best.measured == min(c.measured or 0 for c in tried)
    assert eval(tuning.code, {"drp": drp}).rounds == tuning.best.rounds


@pytest.mark.reports
def test_emulated_devices_are_timed_without_the_model_and_distances_are_the_models(tuning: Tuning) -> None:
    assert list(tuning.calibration.memory) == [f"{n}: emulated:4ms:values=cheap" for n in range(DEVICES)]
    exact = drp.reference("digits", labels=[0], seed=0, steps=STEPS, mode="sequential").samples
    for candidate in tuning.candidates:
        if candidate.measured is not None:
            made = drp.reference("digits", labels=[0], seed=0, steps=STEPS, **candidate.setting.options).samples
            assert candidate.distance == pytest.approx(float((made - exact).norm() / exact.norm()), rel=1e-5)
    assert "without evaluating digits (values=cheap)" in tuning.method[1]
    assert "'4xemulated:4ms'" in tuning.code


def test_what_is_said_of_emulated_devices() -> None:
    names = ["emulated:20ms:values=recorded:jitter=10%", "emulated:30ms"]
    subject = ModelSubject("digits", LeaderOptions(devices=names))
    timed = subject.timed()
    assert timed.devices == ("emulated:20ms:jitter=10%:values=cheap", "emulated:30ms:values=cheap")
    cores = len(os.sched_getaffinity(0))
    assert len(timed.emulation_notes(0.01 * cores)) == 1  # Two evaluations take as long as the faster device.
    late = timed.emulation_notes(0.02 * cores)[1]
    assert f"2 evaluations of {20 * cores:.1f} ms at once take 40.0 ms on {cores} cores, and the devices 20 ms" in late
    on_cores = ModelSubject("digits", LeaderOptions(devices=2))
    assert on_cores.timed() is on_cores


@pytest.mark.reports
def test_other_numbers_of_devices(tuning: Tuning) -> None:
    assert [count for count, _ in tuning.devices] == [1, 2, 3, 4, 5, 8]
    times = [seconds for _, seconds in tuning.devices]
    assert times == sorted(times, reverse=True)  # more devices never take longer, they may stay idle
    assert len([line for line in tuning.advice if "devices such as these" in line]) == 3
    assert [table.title for table in tables(tuning)] == [
        "Measured",
        "Rounds",
        "Settings, the fastest first",
        "Other numbers of devices",
    ]


def test_times_between_and_beyond_the_measured_ones() -> None:
    rounds = {1: RoundTime(1.0, 0.0), 4: RoundTime(0.5, 0.5), 8: RoundTime(1.0, 2.0)}
    found = Calibration(4, rounds, {2: 0.75}, 0.0, {}, 1.0)
    assert [found.seconds(width) for width in (1, 2, 4, 6, 8, 10)] == [1.0, 1.0, 1.0, 2.0, 3.0, 4.0]
    falling = Calibration(2, {1: RoundTime(1.0, 0.0), 2: RoundTime(0.9, 0.0)}, {}, 0.0, {}, 1.0)
    assert falling.seconds(4) == 0.9  # more drafts than were measured are never faster
    # Two drafts on each of four devices: the slowest evaluation takes 1.5 times as long, the rest as long as ever.
    assert found.batch_ratio(2) == 1.5
    assert found.seconds(8, batch=2) == pytest.approx(0.75 + 0.5)
    assert found.seconds(2, batch=2) == pytest.approx(1.0 * 1.5)  # on one device
    assert found.seconds(1, batch=2) == 1.0


@pytest.mark.reports
def test_batches_are_timed_on_all_devices_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = list[int]()
    measure = calibration._measure_rounds

    def noted(session: SubjectSession, width: int, trace: Path) -> tuple[list[Sample], float]:
        widths.append(width)
        return measure(session, width, trace)

    monkeypatch.setattr(calibration, "_measure_rounds", noted)
    monkeypatch.setattr(calibration, "MAX_CALLS", 3)
    found = tune(ModelSubject("tests.denoisers:Tiny", LeaderOptions(devices=2), steps=13))
    assert widths == [1, 2, 4]  # Batches of 4 would need 24 steps.
    assert list(found.calibration.batches) == [2]
    assert {c.setting.drafts for c in found.candidates if c.batch == 2} == {4}


def test_an_impossible_speedup_is_not_advised_without_a_word() -> None:
    assert implausible(2.1, 12, 6) == ""
    assert implausible(2.3, 12, 6) == (
        "6 rounds in place of 12 steps allow only 2.00 times: something slowed the untouched run down. Measure the "
        "times again on a quiet machine."
    )
    rounds = {1: RoundTime(1.0, 0.0), 2: RoundTime(1.0, 0.0)}
    found = Calibration(2, rounds, {}, 0.0, {}, 24.0)
    subject = ModelSubject("digits", LeaderOptions(devices=2), steps=12)
    best = Candidate(Drafted("aggressive", 2), 1, 7, 7.0, measured=7.0, speedup=3.4, varied=1.0, distance=0.1)
    lines = _advice(subject, found, [(2, 7.0)], best, [best])
    assert lines[1] == implausible(3.4, 12, 7)
    assert not any("allow only" in line for line in _advice(subject, found, [], replace(best, speedup=1.7), [best]))


@pytest.mark.reports
def test_the_slowest_evaluation_of_a_round(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    drp.sample("digits", devices="2xemulated:5ms:values=cheap", labels=[3], steps=5, mode="aggressive", trace=path)
    assert round_seconds(path, 2) >= 0.005
    with pytest.raises(ValueError, match="no round of 3 drafts was recorded"):
        round_seconds(path, 3)


@pytest.mark.reports
def test_a_pipeline() -> None:
    pipe = digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    found = tune(PipelineSubject(pipe, {"labels": [3], "num_inference_steps": 5}, 2))
    assert list(found.calibration.rounds) == [1, 2]
    assert found.calibration.fixed >= 0
    assert "drp.diffusers.parallelize(pipe, devices=2" in found.code


@pytest.mark.reports
def test_the_command_prints_json() -> None:
    devices = "2xemulated:2ms:values=cheap"
    done = CliRunner().invoke(main, ["tune", "digits", "-d", devices, "--steps", "6", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {"calibration", "candidates", "devices", "best", "code", "method", "advice"} == set(found)


def test_too_few_steps_are_refused_before_workers_start() -> None:
    with pytest.raises(ValueError, match="steps is 2; a round of two drafts needs 3 steps or more"):
        tune(ModelSubject("digits", LeaderOptions(devices=2), steps=2))


@pytest.mark.reports
def test_three_steps_are_enough() -> None:
    leader = LeaderOptions(devices="2xemulated:2ms:values=cheap")
    assert tune(ModelSubject("digits", leader, steps=3)).best.rounds == 2
