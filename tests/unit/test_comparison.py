"""Which settings a comparison tries, what it recommends, and how it measures distances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from drp.comparison.choose import choose
from drp.comparison.distances import measures
from drp.comparison.models import ModelSubject
from drp.comparison.settings import Drafted, FewerSteps, default_drafts, expand, fewer_steps


def test_settings() -> None:
    assert default_drafts(1) == (2,)
    assert default_drafts(4) == (2, 4)
    assert default_drafts(6) == (2, 4, 6)
    window, conservative = expand(["window", "aggressive", "conservative"], [2])  # with two drafts, two are the same
    assert (window.mode, conservative.mode) == ("window", "conservative")
    assert [s.stride for s in expand(["window"], [4], strides=[2, 3, 5])] == [2, 3]
    assert Drafted("window", 4, stride=2.5).key == "window-n4-stride-2.5"
    assert fewer_steps([window], 48) == [FewerSteps(25), FewerSteps(25, "unipc")]
    (four,) = expand("window", [4])
    assert (four.rounds(48), four.rounds(48, adds_noise=True)) == (17, 20)
    assert fewer_steps([four], 48, adds_noise=True) == [FewerSteps(20), FewerSteps(20, "unipc")]
    assert not ModelSubject("digits").adds_noise
    assert ModelSubject("digits", solver="ddpm").adds_noise


def cell(kind: str, speedup: float, distance: float) -> dict[str, Any]:
    code = f"{kind} {speedup}"
    return {
        "kind": kind,
        "label": code,
        "code": code,
        "steps": 48,
        "rounds": [10],
        "speedup": speedup,
        "distances": {"relative_l2": {"mean": distance}},
    }


def test_the_choice_is_what_the_bounds_ask_for() -> None:
    cells = {
        "near": cell("drafted", 1.5, 0.001),
        "middle": cell("drafted", 2.5, 0.01),
        "far": cell("drafted", 3.5, 0.2),
        "rival": cell("fewer steps", 3.0, 0.02),
    }
    assert choose(cells).key == "middle"
    assert choose(cells, max_distance=0.5).key == "far"
    assert "Fewer steps do better" not in choose(cells).text
    assert choose(cells, min_speedup=1.2).key == "near"
    assert choose(cells, min_speedup=2).key == "middle"
    assert choose(cells, max_distance=0.1, min_speedup=3).key is None
    assert choose(cells, min_speedup=9).text.startswith(
        "No setting is at least 9 times as fast. The closest is drafted 3.5"
    )
    assert "Fewer steps do better: fewer steps 4" in choose({**cells, "better": cell("fewer steps", 4, 0.001)}).text
    assert "slowed" not in choose(cells).text
    odd = choose({"odd": cell("drafted", 9.3, 0.001)}).text
    assert odd.endswith(
        "10 rounds in place of 48 steps allow only 4.80 times: something slowed the untouched run down. Measure the "
        "times again on a quiet machine."
    )


def test_measures_that_are_not_at_hand_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    able, omitted = measures((3, 64, 64))
    assert [m.name for m in able] == ["psnr", "ssim"]
    assert omitted.keys() == {"LPIPS", "CLIP similarity"}
    assert "SSIM" in measures((1, 8, 8))[1]
    with pytest.raises(ValueError, match="from which no CLIP model can be loaded"):
        measures((3, 64, 64), clip=str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    able, omitted = measures((3, 64, 64))
    assert able == []
    assert omitted["PSNR"] == "torchmetrics is not installed: pip install 'draft-refine[compare]'"


def test_clip_similarity_is_the_cosine_of_the_embeddings(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8}
    text = {**small, "vocab_size": 32}
    model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.eval()
    model.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    able, _ = measures((3, 32, 32), clip=str(tmp_path))
    (clip,) = (measure for measure in able if measure.name == "clip")
    a, b = (torch.randint(256, (3, 32, 32), dtype=torch.uint8) for _ in range(2))

    def embed(image: torch.Tensor) -> torch.Tensor:
        mean, std = (
            torch.tensor(v)[:, None, None] for v in (CLIPImageProcessor().image_mean, CLIPImageProcessor().image_std)
        )
        with torch.inference_mode():
            pooled = model.vision_model((image / 255 - mean)[None] / std).pooler_output
            return torch.nn.functional.normalize(model.visual_projection(pooled))[0]

    assert clip.compare(a, b) == pytest.approx(float(embed(a) @ embed(b)), abs=1e-4)
    assert clip.compare(a, a) == pytest.approx(1.0, abs=1e-5)
