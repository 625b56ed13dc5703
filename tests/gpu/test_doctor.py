"""The doctor on a machine with a GPU: what it tries works here, or it says what does not."""

from __future__ import annotations

from drp import doctor


def test_a_gpu_reaches_itself_and_its_memory_is_reached_from_another_process() -> None:
    report = doctor.examine()
    print(report.peers, report.ipc, [finding.seen for finding in report.sections["GPUs"]])
    for place in range(len(report.gpus)):
        assert report.peers[place][place] == "itself"
        assert report.ipc[place][place] == "works"
