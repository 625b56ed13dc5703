"""The wheel: built, checked, installed in a fresh environment outside the repository, and used there."""

from __future__ import annotations

import email
import email.message
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.package


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without this repository on Python's path; return what it printed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the wheel and the source archive of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of an environment with the wheel and, from this one, everything that is not drp."""
    folder = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    # Dependencies are those of this environment: torch need not be installed twice. A .pth file inside a folder that
    # another .pth file names is not read, so an editable drp of this environment is not there.
    others = {sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("site-packages"))}
    (packages / "dependencies.pth").write_text("\n".join(sorted(others)) + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "bin"


def test_twine_takes_both(built: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir(), cwd=built)


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def test_the_metadata_says_what_a_user_looks_for(wheel: Path) -> None:
    found = metadata(wheel)
    assert found["Name"] == "draft-refine"
    assert found["Requires-Python"] == ">=3.10"
    assert found["License-Expression"] == "Apache-2.0"
    labels = {url.partition(",")[0] for url in found.get_all("Project-URL", [])}
    assert labels >= {"Homepage", "Documentation", "Source", "Issues", "Changelog", "Paper"}
    assert "Typing :: Typed" in found.get_all("Classifier", [])
    assert {"diffusers", "serve"} <= set(found.get_all("Provides-Extra", []))
    assert not [line for line in found.get_all("Requires-Dist", []) if " @ " in line]


def test_extras_allow_no_version_that_diffusers_refuses(wheel: Path) -> None:
    from diffusers.utils.constants import MIN_PEFT_VERSION
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist", [])]
    (peft,) = (each for each in wanted if each.name == "peft")
    assert str(peft.specifier) == f">={MIN_PEFT_VERSION.removesuffix('.0')}"


def test_the_version_is_that_of_the_tag(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    run("git", "clone", "-q", "--no-local", ROOT, clone, cwd=tmp_path)
    run("git", "tag", "v9.8.7", cwd=clone)
    assert run(sys.executable, "-m", "setuptools_scm", cwd=clone).strip() == "9.8.7"
    shutil.rmtree(clone / ".git")
    assert run(sys.executable, "-m", "setuptools_scm", cwd=clone).strip() == "0.1.0"


def test_the_wheel_has_the_package_alone_and_all_of_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"drp"}
    tracked = run("git", "ls-files", "drp", cwd=ROOT).splitlines()
    assert not [name for name in tracked if name not in names]


def test_the_source_archive_can_be_built_from(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "drp/__init__.py"} <= names


def test_it_works_where_it_is_installed(installed: Path, wheel: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import drp; print(drp.__file__, drp.__version__)", cwd=tmp_path).split()
    assert where[0].startswith(str(installed.parent))
    assert where[1] == metadata(wheel)["Version"]
    assert where[1] in run(installed / "drp", "--version", cwd=tmp_path)
    said = run(installed / "drp", "sample", "digits", "-l", "3,1", "-n", "8", "-d", "2", "-o", "out.png", cwd=tmp_path)
    assert "8 steps in 5 rounds" in said
    assert (tmp_path / "out.png").stat().st_size > 0


def test_a_message_that_names_an_extra_names_this_distribution(installed: Path, tmp_path: Path) -> None:
    """What the messages say, `pip install 'draft-refine[gpu]'`, asks for this distribution's extra and no other's."""
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        installed / "python",
        "install",
        "--dry-run",
        "--no-index",
    ]
    said = run(*command, "--no-deps", "draft-refine[serve]", cwd=tmp_path)
    assert "Requirement already satisfied: draft-refine" in said
