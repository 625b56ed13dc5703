"""The house: who may import whom, and what shows at the top."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    return subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True, timeout=60
    )


def test_imports_follow_the_arrows() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("drp/sampling/linear.py", "import drp.protocol.codec"),
        ("drp/protocol/codec.py", "import drp.sampling.linear"),
        ("drp/models/unet.py", "import drp.workers.entry"),
        ("drp/workers/worker.py", "import drp.leader.devices"),
        ("drp/leader/supervision/local.py", "import drp.workers.entry"),
    ],
)
def test_a_wrong_arrow_is_noticed(tmp_path: Path, file: str, line: str) -> None:
    shutil.copytree(ROOT / "drp", tmp_path / "drp", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    changed = tmp_path / file
    changed.write_text(changed.read_text() + f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "BROKEN" in result.stdout


@pytest.mark.parametrize("part", ["workers", "protocol"])
def test_parts_show_at_the_top(part: str) -> None:
    assert (ROOT / part).is_symlink()
    assert (ROOT / part).resolve() == ROOT / "drp" / part


def test_the_weights_are_small() -> None:
    assert (ROOT / "drp/models/digits.safetensors").stat().st_size <= 6_000_000
