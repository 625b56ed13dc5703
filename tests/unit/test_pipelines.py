"""Pipelines by name: what is refused, with which message, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("diffusers")

from drp.cli import main
from drp.diffusers.digits import digits_pipeline
from drp.pipelines import find_factory, is_pipeline, load_pipeline

NEEDS = "give a pipeline's folder, a hub's name such as org/name, or package.module:factory"
BROKEN = [
    ("nowhere:make", "'nowhere:make': there is no module 'nowhere'"),
    ("drp.diffusers.digits:nothing", "module 'drp.diffusers.digits' has no attribute 'nothing'; write package.module:"),
    ("drp.diffusers.digits:", "is a module; a factory is a function without arguments"),
    (":make", "there is no module ''"),
    ("drp.models.digits:WEIGHTS", "is a PosixPath; a factory is a function without arguments"),
    ("drp.models.digits:load", "'drp.models.digits:load' returned a Digits, which is not a diffusers pipeline"),
    ("broken_by_import:make", "module 'broken_by_import' cannot be imported: No module named 'not_installed'"),
    ("sdxl", f"'sdxl' is neither a folder nor a name on the hub; {NEEDS}"),
    ("models/of/mine", "is neither a folder nor a name on the hub"),
    ("../mine", "is neither a folder nor a name on the hub"),
    ("/tmp/of-no-one", "is neither a folder nor a name on the hub"),
    ("empty", "'empty' is a folder without model_index.json, so it holds no pipeline"),
    ("damaged", "cannot load the pipeline 'damaged'"),
]


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("broken_by_import.py").write_text("import not_installed\n")
    Path("empty").mkdir()
    Path("damaged").mkdir()
    Path("damaged/model_index.json").write_text("{")


@pytest.mark.parametrize(("name", "message"), BROKEN)
def test_what_is_no_pipeline_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is checked below
        load_pipeline(name)
    assert message in str(caught.value)


@pytest.mark.parametrize("command", [["compare"], ["tune"], ["sample", "--prompt", "3", "--diffusers"]])
@pytest.mark.parametrize(("name", "message"), [BROKEN[0], BROKEN[1], BROKEN[11]])
def test_commands_have_the_same_messages(
    command: list[str], name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("workers are started")

    monkeypatch.setattr("drp.leader.leader.Leader.__init__", never)
    done = CliRunner().invoke(main, [*command, name])
    assert done.exit_code == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_factory() -> None:
    assert find_factory("drp.diffusers.digits:digits_pipeline") is digits_pipeline
    made = load_pipeline("drp.diffusers.digits:digits_pipeline")
    assert is_pipeline(made)
    assert not is_pipeline(made.unet)


def test_a_folder() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, norm_num_groups=4, layers_per_block=1, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained("saved")
    assert type(load_pipeline("saved")) is DDPMPipeline
