"""Wrong input of `drp compare` is one line, and nothing is started or written."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from drp.cli import main

ROOT = Path(__file__).parents[2]


def never(*_: object, **__: object) -> None:
    raise AssertionError("workers were started")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digitz"], "'digitz' is neither a folder nor a name on the hub; give digits, a pipeline's folder"),
        (["no_such_module:make"], "there is no module 'no_such_module'"),
        (["digits", "--prompt", "a cat"], "--prompt applies to a diffusers pipeline"),
        (["digits", "--modes", "agressive"], "unknown mode 'agressive'"),
        (["digits", "--drafts", "two"], "is not a comma-separated list"),
        (["digits", "--drafts", "0"], "drafts is 0; a round needs at least 1 draft"),
        (["digits", "--strides", "nan"], "stride is nan"),
        (["digits", "--tolerances", "-1"], "tolerance is -1.0"),
        (["digits", "--devices", "2xabacus"], "abacus"),
        (["digits", "--out", __file__], "test_compare_input.py', which is a file; name a folder"),
        (["digits", "--out", f"{__file__}/report"], "test_compare_input.py' is a file; name a folder"),
        (["digits", "--out", str(ROOT)], "a folder with other things in it; name a new one"),
        (["digits", "--labels", "11"], "label 11 is out of range"),
        (["drp.diffusers.digits:digits_pipeline", "--labels", "3"], "--labels applies to a model"),
        (["drp.diffusers.digits:digits_pipeline", "--call", "{"], "which is not valid JSON"),
        (["drp.diffusers.digits:digits_pipeline", "--prompt", "a cat"], "DigitsPipeline takes no prompt"),
        (["drp.diffusers.digits:digits_pipeline", "--modes", "rolling"], "goes back to steps"),
    ],
)
def test_bad_input_is_a_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("drp.leader.leader.Leader.__init__", never)
    done = CliRunner().invoke(main, ["compare", *arguments])
    assert done.exit_code in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "agressive"], "unknown mode 'agressive'; choose one of sequential, conservative"),
        (["--out", __file__], "which is a file; name a folder"),
        (["--call", "{"], "which is not valid JSON"),
        (["--devices", "2xabacus"], "abacus"),
    ],
)
def test_bad_input_is_refused_before_a_pipeline_is_loaded(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loads_long.py").write_text("raise AssertionError('it is loaded')")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["compare", "loads_long:make", *arguments])
    assert done.exit_code == 1
    assert message in done.stderr
