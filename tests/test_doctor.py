"""The doctor, on a machine without a GPU: what it says is so."""

from __future__ import annotations

import os
import resource

import pytest
import torch
from click.testing import CliRunner

from drp import doctor
from drp.cli import main
from drp.leader.gpus import Gpu


def seen(report: doctor.Report, about: str) -> doctor.Finding:
    return next(f for findings in report.sections.values() for f in findings if f.about == about)


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    return doctor.examine()


def test_it_names_what_this_process_has(report: doctor.Report) -> None:
    cores = len(os.sched_getaffinity(0))
    assert f", {cores} of " in seen(report, "this process may use").seen
    assert torch.__version__ in seen(report, "torch").seen
    assert seen(report, "open files").seen.startswith(str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    assert seen(report, "devices=N").seen.startswith("a worker a core, cpu:0")
    assert "GiB" in seen(report, "memory").seen


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_it_says_why_there_is_no_gpu(report: doctor.Report) -> None:
    assert "built without CUDA" in seen(report, "GPUs").seen
    assert "built without CUDA" in seen(report, "devices='cuda'").seen
    assert (report.gpus, report.peers) == ((), ())


def test_workers_can_open_the_leaders_memory_or_it_says_that_they_cannot(
    report: doctor.Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seen(report, "memfd through /proc/PID/fd").state == "good"
    monkeypatch.setattr(doctor, "SEEN", "import os, sys; os.open(sys.argv[1] + '9999', os.O_RDWR)")
    failed = doctor.shared_memory()
    assert (failed.state, "FileNotFoundError" in failed.seen) == ("bad", True)
    assert failed.remedy


def test_too_few_files_are_in_the_way() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.sched_getaffinity(0)) * doctor.FILES - 1, before[1]))
    try:
        found = doctor.examine()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [finding.about for finding in found.bad] == ["open files"]
    assert found.bad[0].remedy.startswith("ulimit -n")


def test_gpus_that_there_are_become_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "peers", lambda gpus: ())  # a copy needs one
    gpu = Gpu(0, "GPU-1234", "A GPU", 3 * 2**30, "0000:17:00.0", (0, 1, 2, 5))
    found = doctor.examine(lambda: (gpu,))
    assert seen(found, "cuda:0").seen == "A GPU, GPU-1234, 3.0 GiB, at 0000:17:00.0, beside cores 0-2,5"
    assert seen(found, "devices='cuda'").seen.startswith("cuda:0, in turn")


def test_the_command_prints_every_line(report: doctor.Report) -> None:
    shown = CliRunner().invoke(main, ["doctor"])
    assert shown.exit_code == 0, shown.output
    for findings in report.sections.values():
        for finding in findings:
            assert finding.about in shown.output
