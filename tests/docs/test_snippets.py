"""What README and guides tell a user to type: extracted, and run in a fresh copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
pytestmark = [pytest.mark.docs, pytest.mark.timeout(600)]


def blocks(page: str) -> list[tuple[str, str]]:
    """Return the fenced blocks of a page, each with its language."""
    return [(language, text) for language, text in FENCE.findall((ROOT / page).read_text())]


def script(page: str) -> str:
    """Return a shell script that does what the page says, in order; a block that begins `# NAME.py` is that file."""
    lines = ["set -eu"]
    for number, (language, text) in enumerate(blocks(page)):
        named = re.match(r"# (\w+\.(?:py|toml))\n", text)
        if language == "bash":
            lines.append(text)
        elif language == "python":
            name = named[1] if named else f"snippet_{number}.py"
            lines += [f"cat > {name} <<'END_OF_SNIPPET'", text.rstrip(), "END_OF_SNIPPET"]
            lines += [] if named else [f"python {name}"]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the tracked files of this checkout, as they are now."""
    folder = tmp_path_factory.mktemp("copy") / "draft-refine"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def follow(page: str, folder: Path) -> str:
    """Run what a page says; return what it printed.

    pip finds the dependencies on PYTHONPATH, so torch is not installed anew, and the build backend there too.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    packages = {sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))}
    env |= {
        "CUDA_VISIBLE_DEVICES": "",  # the counts of devices that pages show are of cores then, on every machine
        "PYTHONPATH": os.pathsep.join(sorted(packages)),
        "PIP_NO_BUILD_ISOLATION": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PATH": f"{folder / 'bin'}{os.pathsep}{env['PATH']}",
    }
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("python3", "python"):
        if not (folder / "bin" / name).exists():
            (folder / "bin" / name).symlink_to(Path(sys.executable).resolve())
    done = subprocess.run(
        ["bash", "-c", script(page)], cwd=folder, env=env, capture_output=True, text=True, timeout=580, check=False
    )
    assert done.returncode == 0, f"{script(page)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_readme_can_be_followed(copy: Path) -> None:
    said = follow("README.md", copy)
    assert "25 rounds, 48 evaluations" in said, said  # the pipeline, with two workers
    assert "25 rounds instead of 48" in said, said
    assert (copy / "digits.png").stat().st_size > 0
    assert (copy / "latents.safetensors").stat().st_size > 0
    assert (copy / ".venv/bin/drp").exists()


@pytest.mark.parametrize("page", ["docs/quickstart.md", "docs/own-models.md"])
def test_a_guide_can_be_followed(page: str, tmp_path: Path) -> None:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        ["bash", "-c", f'python() {{ "{sys.executable}" "$@"; }}\n{script(page)}'],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
