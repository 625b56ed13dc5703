"""The doctor, on a machine without a GPU: what it says is so."""

from __future__ import annotations

import io
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from drp import doctor
from drp.cli import main
from drp.cli.doctor_tables import tables
from drp.leader.gpus import Gpu
from tests import on_host


def seen(report: doctor.DoctorReport, about: str) -> doctor.Finding:
    return next(f for findings in report.sections.values() for f in findings if f.about == about)


@pytest.fixture(scope="module")
def report() -> doctor.DoctorReport:
    return doctor.examine()


def test_it_names_what_this_process_has(report: doctor.DoctorReport) -> None:
    cores = len(os.sched_getaffinity(0))
    assert f", {cores} of " in seen(report, "this process may use").seen
    assert torch.__version__ in seen(report, "torch").seen
    assert seen(report, "open files").seen.startswith(str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    assert seen(report, "devices=N").seen.startswith("a worker a core, cpu:0")
    assert "GiB" in seen(report, "memory").seen


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
def test_it_says_why_there_is_no_gpu(report: doctor.DoctorReport) -> None:
    assert "built without CUDA" in seen(report, "GPUs").seen
    assert "built without CUDA" in seen(report, "devices='cuda'").seen
    assert (report.gpus, report.peers, report.ipc) == ((), (), ())


def test_workers_can_open_the_leaders_memory_or_it_says_that_they_cannot(
    report: doctor.DoctorReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seen(report, "memfd through /proc/PID/fd").state == "good"
    monkeypatch.setattr(doctor, "SEEN", "import os, sys; os.open(sys.argv[1] + '9999', os.O_RDWR)")
    failed = doctor.shared_memory()
    assert (failed.state, "FileNotFoundError" in failed.seen) == ("bad", True)
    assert failed.remedy


def test_too_few_files_are_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    few = len(os.sched_getaffinity(0)) * doctor.FILES - 1
    monkeypatch.setattr(resource, "getrlimit", lambda what: (few, 10 * few))
    found = doctor.examine()
    assert [finding.about for finding in found.bad] == ["open files"]
    assert found.bad[0].remedy.startswith("ulimit -n")


@pytest.mark.parametrize("has_gpus", [True, False])
def test_memory_for_cudas_events_is_missed_only_with_gpus(has_gpus: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SHM", "/no/such/folder")
    found = doctor._shm(has_gpus)
    assert (found.seen, found.state) == ("missing: No such file or directory", "bad" if has_gpus else "")
    assert ("mount a tmpfs" in found.remedy) is has_gpus


def test_gpus_that_there_are_become_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "peers", lambda gpus: (("itself", "copied, direct"),) * 2)  # a copy needs two
    gpus = (Gpu(0, "GPU-1", "A GPU", 3 * 2**30, "0000:17:00.0", (0, 1, 2, 5), 1), Gpu(1, "GPU-2", "B MIG 1g.5gb"))
    found = doctor.examine(lambda: gpus)
    assert seen(found, "cuda:0").seen == "A GPU, GPU-1, 3.0 GiB, at 0000:17:00.0, beside cores 0-2,5, NUMA node 1"
    assert seen(found, "cuda:1").seen.endswith("a MIG slice, without IPC to others")
    assert seen(found, "devices='cuda'").seen.startswith("cuda:0, cuda:1, in turn")
    assert seen(found, "devices=N").seen == "a worker a GPU, N up to 2"
    assert seen(found, "devices='Nxcpu'").seen.startswith("a worker a core, cpu:0")
    # This machine does not see these GPUs: what was tried says so, and drp would do without.
    assert all("does not see the GPU" in how and "GPU-1" in how for row in found.ipc for how in row)
    assert seen(found, "runs' memory").seen.startswith("on the host, pinned, with workers on cuda:0, cuda:1")
    assert "on cuda:0, cuda:1 one per worker" in seen(found, "weights").seen
    shown = Console(width=200, record=True, file=io.StringIO())
    shown.print(*tables(found))
    assert "CUDA IPC between two processes, tried" in shown.export_text()


def test_memory_of_gpus_is_tried_from_a_process_on_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GpuMemory", on_host.HostGpuMemory)
    gpus = on_host.GPUS
    python = str(on_host.interpreter(tmp_path))
    monkeypatch.setattr(doctor, "find_interpreter", lambda: python)

    def spoil(memory: on_host.HostGpuMemory) -> None:
        _, handle = memory.ipc_handles
        if handle is not None and handle.device == gpus[1].uuid:
            memory.tensor(0, (1,), torch.uint8).fill_(77)

    monkeypatch.setattr(on_host.HostGpuMemory, "record_event", spoil)
    assert doctor.ipc(gpus) == (("works", "works"), ("WRONG", "WRONG"))
    used = {finding.about: finding.seen for finding in doctor._use(gpus, "", (("works", "works"),) * 2)}
    assert used["runs' memory"] == "on cuda:0, if that is the first named: all GPUs reach it"
    assert used["weights"] == "one copy for all workers of a GPU"
    python = "/bin/false"
    assert doctor.ipc(gpus[:1]) == (("fails: the process there ended with exit code 1",),)


def test_it_says_in_which_process_namespace_it_is(report: doctor.DoctorReport) -> None:
    said = seen(report, "process namespace").seen
    assert said.startswith("pid:[")
    assert ("the machine's own" in said) is (str(Path("/proc/self/ns/pid").readlink()) == doctor.FIRST_NAMESPACE)


def test_the_command_prints_every_line(report: doctor.DoctorReport) -> None:
    shown = CliRunner().invoke(main, ["doctor"])
    assert shown.exit_code == 0, shown.output
    for findings in report.sections.values():
        for finding in findings:
            assert finding.about in shown.output


def test_the_command_prints_json(report: doctor.DoctorReport) -> None:
    shown = CliRunner().invoke(main, ["doctor", "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert set(found) == {"sections", "gpus", "peers", "ipc"}
    software = {finding["about"]: finding["seen"] for finding in found["sections"]["software"]}
    assert software["python"] == seen(report, "python").seen
    assert [finding["about"] for finding in found["sections"]["cores"]]
