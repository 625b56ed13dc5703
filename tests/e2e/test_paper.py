"""bench.paper: its table on a few digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.paper import main


def test_the_table_of_digits(tmp_path: Path) -> None:
    out = tmp_path / "paper.json"
    done = CliRunner().invoke(main, ["--pipeline", "digits", "--count", "2", "--devices", "2", "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = {row["label"]: row for row in json.loads(out.read_text())}
    assert rows["sequential"]["rounds"] == 48
    rounds = {label: row["rounds"] for label, row in rows.items()}
    assert [rounds[f"conservative, n = {n}, rule paper"] for n in (2, 3, 4)] == [32, 24, 20]
    assert [rounds[f"aggressive, n = {n}, rule paper"] for n in (2, 3, 4)] == [25, 17, 13]
    assert [rounds[f"window, n = {n}"] for n in (2, 3, 4)] == [25, 20, 17]
    assert rows["sequential"]["metrics"] == {"Frechet, classifier": pytest.approx(0, abs=1e-6), "read as asked": 1.0}
    assert "stand in for Inception and CLIP" in done.stdout
