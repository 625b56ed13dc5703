"""`drp compare`: figures that the saved samples bear out, a report that works anywhere, and comparisons that go on."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file
from scipy.ndimage import gaussian_filter

import drp
from drp.comparison import Comparison, compare
from drp.diffusers import compare as compare_pipelines
from tests.browser import PROGRAM, Browser, browser
from tests.tiny import Case
from tests.tiny.stable_diffusion import SIZE, XL, xl

ROOT = Path(__file__).parents[2]

STEPS, SEEDS = 8, 2

pytestmark = pytest.mark.timeout(300)  # Many runs are compared, and a machine may be busy with other things.

ASKED: dict[str, Any] = {"devices": 2, "steps": STEPS, "seeds": SEEDS, "turns": 1, "modes": ["window", "adaptive"]}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare("digits", **ASKED, rivals=True, out=tmp_path_factory.mktemp("digits") / "report")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    pipe = Case(xl, {}).make("StableDiffusionXLPipeline")
    call = {**XL, **SIZE, "height": 32, "width": 32, "num_inference_steps": STEPS, "output_type": "pt"}
    folder = tmp_path_factory.mktemp("sdxl") / "report"
    return compare_pipelines(pipe, call, devices=2, modes=["window"], seeds=2, turns=2, rivals=True, out=folder)


def read(comparison: Comparison) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(comparison.report.with_name("results.json").read_text())
    return found


def latents(folder: Path) -> NDArray[np.float64]:
    return np.asarray(load_file(folder / "latents.safetensors")["latents"], dtype=np.float64)


def pictures(folder: Path) -> list[NDArray[np.float64]]:
    return [np.asarray(Image.open(path), dtype=np.float64) / 255 for path in sorted(folder.glob("*.png"))]


def psnr(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    error = float(np.mean((a - b) ** 2))
    return 10 * math.log10(1 / error) if error else math.inf


def ssim(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Wang et al. 2004: Gaussian windows of 11 pixels with sigma 1.5, as scipy computes them."""

    def blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(gaussian_filter(x, 1.5, mode="mirror", radius=5, axes=(0, 1)))

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return float(index.mean())


@pytest.mark.reports
@pytest.mark.parametrize("name", ["digits", "sdxl"])
def test_every_figure_follows_from_what_was_saved(name: str, request: pytest.FixtureRequest) -> None:
    comparison: Comparison = request.getfixturevalue(name)
    results, samples = read(comparison), comparison.report.parent / "samples"
    exact, originals = latents(samples / "untouched"), pictures(samples / "untouched")
    assert len(results["cells"]) >= 3
    for key, cell in results["cells"].items():
        ours, images = latents(samples / key), pictures(samples / key)
        l2 = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(ours, exact, strict=True)]
        assert cell["distances"]["relative_l2"]["each"] == pytest.approx(l2, rel=1e-9)
        assert cell["distances"]["relative_l2"]["mean"] == pytest.approx(statistics.mean(l2))
        assert cell["distances"]["relative_l2"]["max"] == pytest.approx(max(l2))
        noise = [psnr(a, b) for a, b in zip(images, originals, strict=True)]
        finite = [value if math.isfinite(value) else None for value in noise]
        assert cell["distances"]["psnr"]["each"] == pytest.approx(finite, rel=1e-4)
        if math.isfinite(statistics.median(noise)):
            assert cell["distances"]["psnr"]["median"] == pytest.approx(statistics.median(noise), rel=1e-4)
        alike = [ssim(a, b) for a, b in zip(images, originals, strict=True)]
        assert cell["distances"]["ssim"]["each"] == pytest.approx(alike, abs=2e-4)
        assert cell["distances"]["ssim"]["mean"] == pytest.approx(statistics.mean(alike), abs=2e-4)
        untouched, seconds = statistics.median(cell["untouched_seconds"]), statistics.median(cell["seconds"])
        assert cell["speedup"] == pytest.approx(untouched / seconds)
        assert cell["reason"] == ""
        assert cell["untouched_repeats"] == 0
    fastest = max((c for c in results["cells"].values() if c["kind"] == "drafted"), key=lambda c: c["speedup"])
    near = fastest["distances"]["relative_l2"]["mean"] <= 0.05
    assert not near or results["recommendation"]["code"] == fastest["code"]


@pytest.mark.reports
def test_samples_and_counts_are_those_of_the_run(digits: Comparison) -> None:
    cell = digits.cells["window-n2"]
    assert cell["rounds"] == [5, 5]  # 1 + ceil(7 / 2)
    assert cell["evaluations"] == [8, 8]
    assert digits.cells["5-steps"]["rounds"] == [5, 5]
    samples = digits.report.parent / "samples"
    for seed in range(SEEDS):
        drafted = drp.reference("digits", devices=2, steps=STEPS, labels=[seed], seed=seed).samples
        assert np.array_equal(load_file(samples / "window-n2/latents.safetensors")["latents"][seed], drafted.numpy())
        solver = drp.reference("digits", steps=5, labels=[seed], seed=seed, mode="sequential", solver="unipc").samples
        rival = load_file(samples / "5-steps-of-unipc/latents.safetensors")["latents"][seed]
        assert np.allclose(rival, solver, atol=1e-5)  # another number of threads


@pytest.mark.reports
def test_the_recommended_code_runs(digits: Comparison, sdxl: Comparison) -> None:
    assert not digits.choice.key or digits.choice.code == digits.cells[digits.choice.key]["code"]
    result = eval(digits.cells["window-n2"]["code"], {"drp": drp})
    assert result.rounds == 5
    pipe = Case(xl, {}).make("StableDiffusionXLPipeline")
    assert "drp.diffusers.parallelize(pipe, devices=2, mode='window', drafts=2)" in sdxl.cells["window-n2"]["code"]
    assert "UniPCMultistepScheduler.from_config(pipe.scheduler.config)" in sdxl.cells["5-steps-of-unipc"]["code"]
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"


def never(*_: object, **__: object) -> None:
    raise AssertionError("workers were started")


@pytest.mark.reports
def test_what_is_done_is_not_done_again(digits: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "again"
    shutil.copytree(digits.report.parent, folder)
    (folder / "report.html").unlink()
    monkeypatch.setattr("drp.leader.leader.Leader.__init__", never)
    again = compare("digits", **ASKED, rivals=True, out=folder, max_distance=1e-9)
    assert again.cells == digits.cells
    assert again.choice.key is None
    assert again.choice.text.startswith("No setting is within a relative L2 distance of 1e-09.")
    assert again.report.exists()


@pytest.mark.reports
def test_emulated_devices_that_cannot_keep_their_time(tmp_path: Path) -> None:
    """An evaluation of digits takes longer than 100 us, on any core."""
    asked: dict[str, Any] = {"steps": 4, "seeds": 1, "turns": 1, "modes": ["aggressive"], "out": tmp_path / "report"}
    found = compare("digits", devices="2xemulated:100us", **asked)
    (note,) = (note for note in found.notes if note.startswith("The emulated devices took up to"))
    assert float(note.split()[6]) > 1.1
    assert note in found.report.with_name("report.md").read_text()


@pytest.mark.reports
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 9}, "steps 8, not 9"),
        ({"seeds": 3}, "seeds [0, 1], not [0, 1, 2]"),
        ({"modes": ["agressive"]}, "unknown mode 'agressive'"),
        ({"turns": 0}, "turns 0"),
        ({"max_distance": -1.0}, "max_distance is -1.0"),
        ({"mode": "window"}, "mode is given, but a comparison tries several"),
        ({"strides": [3.0]}, "a window of n drafts advances by 1 to n"),
    ],
)
def test_what_cannot_be_is_refused_first(
    changed: dict[str, Any], message: str, digits: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drp.leader.leader.Leader.__init__", never)
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]")):
        compare("digits", **{**ASKED, "modes": ["window"], **changed}, out=digits.report.parent)


def test_other_files_stay(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="a folder with other things in it"):
        compare("digits", **ASKED, out=tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="not a comparison written by drp"):
        compare("digits", **ASKED, out=tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="you may not write to"):
        compare("digits", **ASKED, out=tmp_path / "report")


@pytest.mark.reports
def test_an_interrupted_comparison_leaves_a_report_and_goes_on(tmp_path: Path) -> None:
    """Ctrl-C, as a terminal sends it: to the program and to all its workers."""
    command = [str(Path(sys.executable).with_name("drp")), "compare", "digits", "--devices", "2", "--steps", str(STEPS)]
    command += ["--seeds", "2", "--turns", "1", "--modes", "window,conservative", "--drafts", "2,3"]
    command += ["--out", "report"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore SIGINT, and so do their children: tests may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    results = tmp_path / "report/results.json"
    deadline = time.monotonic() + 100
    while not (results.exists() and json.loads(results.read_text())["cells"]):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130, errors
    assert "Traceback" not in errors
    assert "interrupted; report/report.html has what is done" in errors
    before = json.loads(results.read_text())["cells"]
    assert 1 <= len(before) < 4
    report = (tmp_path / "report/report.html").read_text()
    assert f"{len(before)} of 4 settings are measured" in report
    second = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert second.returncode == 0, second.stderr
    cells = json.loads(results.read_text())["cells"]
    assert len(cells) == 4
    assert {name: cells[name]["seconds"] for name in before} == {name: cell["seconds"] for name, cell in before.items()}
    assert "settings are measured" not in (tmp_path / "report/report.html").read_text()


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("there is no Chromium here")
    with browser() as found:
        yield found


@pytest.mark.reports
@pytest.mark.parametrize("name", ["digits", "sdxl"])
def test_the_report_in_a_browser(name: str, request: pytest.FixtureRequest, page: Browser) -> None:
    comparison: Comparison = request.getfixturevalue(name)
    text = comparison.report.read_text()
    assert "http://" not in text
    assert "https://" not in text
    page.go(comparison.report.as_uri())
    page.until("document.body?.dataset.state === 'done'")
    backgrounds = set()
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        backgrounds.add(page.value("getComputedStyle(document.body).backgroundColor"))
        for width in (1100, 400):
            page.resize(width, 800)
            assert page.value("document.documentElement.scrollWidth <= window.innerWidth")
    assert len(backgrounds) == 2
    rows = page.value("document.querySelectorAll('.sheet tbody tr').length")
    assert rows == len(read(comparison)["facts"]["seeds"])
    assert page.value("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.value("document.querySelectorAll('svg .point').length") == len(comparison.cells)
    evaluated = page.value("document.querySelectorAll('.lane i').length")
    assert evaluated >= 6
    hidden = "[...document.querySelectorAll('img.difference')].filter(i => i.offsetParent === null).length"
    count = page.value("document.querySelectorAll('img.difference').length")
    assert page.value(hidden) == count
    page.value("document.getElementById('differences').click()")
    assert page.value(hidden) == 0
    # What Chromium itself asked other hosts for, which is nothing.
    assert page.value("performance.getEntriesByType('resource').every(e => e.name.startsWith('data:'))")
