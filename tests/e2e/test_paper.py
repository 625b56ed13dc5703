"""bench.paper: its table on a few digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.paper import main, settings

STEPS = 10


def test_a_pipeline_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("a cat\na dog\n")
    done = CliRunner().invoke(main, ["--pipeline", "sdxl", "--captions", str(tmp_path / "captions.txt")])
    assert done.exit_code == 2
    assert "'sdxl' is neither a folder" in done.stderr
    done = CliRunner().invoke(main, ["--pipeline", "sdxl"])
    assert "a pipeline needs --captions" in done.stderr


@pytest.mark.reports
def test_the_table_of_digits(tmp_path: Path) -> None:
    out = tmp_path / "paper.json"
    asked = ["--pipeline", "digits", "--count", "2", "--steps", str(STEPS), "--devices", "2", "--out", str(out)]
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0, done.output
    rows = {row["label"]: row for row in json.loads(out.read_text())}
    expected = {setting.label: setting.rounds(STEPS) for setting in settings()}
    assert {label: row["rounds"] for label, row in rows.items()} == {"sequential": STEPS, **expected}
    assert len(expected) == 9
    assert rows["sequential"]["metrics"]["Frechet, classifier"] == pytest.approx(0, abs=1e-3)  # of singular covariances
    assert rows["aggressive, n = 4, rule paper"]["metrics"]["Frechet, classifier"] > 1e-3
    assert done.stdout.count("\n| ") == len(rows)
    assert "stand in for Inception and CLIP" in done.stdout
