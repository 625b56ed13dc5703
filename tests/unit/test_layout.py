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


def test_wrong_arrows_are_noticed(tmp_path: Path) -> None:
    """All in one copy; each must be named."""
    shutil.copytree(ROOT / "drp", tmp_path / "drp", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    wrong = {
        "drp.sampling.linear": "drp.protocol.codec",
        "drp.protocol.codec": "drp.sampling.linear",
        "drp.models.unet": "drp.workers.entry",
        "drp.workers.worker": "drp.leader.devices",
        "drp.leader.supervision.local": "drp.workers.entry",
    }
    for module, imported in wrong.items():
        changed = tmp_path / f"{module.replace('.', '/')}.py"
        changed.write_text(changed.read_text() + f"\nimport {imported}\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    for module, imported in wrong.items():
        assert f"-   {module} -> {imported} (l." in result.stdout, result.stdout


@pytest.mark.parametrize("part", ["workers", "protocol"])
def test_parts_show_at_the_top(part: str) -> None:
    assert (ROOT / part).is_symlink()
    assert (ROOT / part).resolve() == ROOT / "drp" / part


def test_the_weights_are_small() -> None:
    assert (ROOT / "drp/models/digits.safetensors").stat().st_size <= 6_000_000
