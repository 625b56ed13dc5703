"""The benches of pipelines for a GPU, with tiny networks on cores."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

from bench.gpu_pipelines import main

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_pipeline_has_the_bits_of_reference_alone_and_in_batches(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--tiny", "--eager", "--only", "flux", "--steps", "12"])
    rows = {line[2:36].strip(): line[36:] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert rows["the bits of reference"] == rows["four drafts as a batch, the bits"] == "True"
    assert rows["one draft, the untouched bits"] == "True"
    assert rows["rounds"] == "7 of 12 steps"
    assert rows["batched"] == "yes"
