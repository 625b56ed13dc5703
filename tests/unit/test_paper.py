"""bench.paper: its metrics against known values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from bench.paper import Row, write_table
from bench.paper_metrics import Frechet, MissingError, Score, clip_score, make_metrics, pick_score, reference_stats
from bench.quality import frechet, frechet_of_moments


def test_the_frechet_distance_of_known_gaussians() -> None:
    one, eye = torch.ones(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    assert frechet_of_moments(0 * one, eye, 2 * one, eye) == pytest.approx(12)  # |m|^2
    assert frechet_of_moments(one, 4 * eye, one, 9 * eye) == pytest.approx(3)  # d (2 - 3)^2
    a, b = (torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    b = b @ torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.3
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    expected = float(((a.mean(0) - b.mean(0)) ** 2).sum()) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)


def mean_color(images: Tensor) -> Tensor:
    return images.float().mean(dim=(2, 3))


def test_fid_with_small_features(tmp_path: Path) -> None:
    pictures = torch.randint(256, (20, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = mean_color(pictures).double()
    path = tmp_path / "stats.npz"
    np.savez(path, mu=features.mean(0).numpy(), sigma=torch.cov(features.T).numpy())
    metric = Frechet(mean_color, *reference_stats(path))
    for picture in pictures:
        metric.add(picture, "")
    assert metric.result() == pytest.approx(0, abs=1e-6)
    for picture in pictures:
        metric.add((picture.float() * 0.5).to(torch.uint8), "")
    assert metric.result() > 100
    np.savez(path, features=features.numpy())
    with pytest.raises(MissingError, match="reference statistics are mu and sigma"):
        reference_stats(path)


def tiny_clip(folder: Path) -> Any:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *"abct", *(f"{letter}</w>" for letter in "abct")]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": 1, "bos_token_id": 0}
    vision = {**small, "image_size": 32, "patch_size": 8}
    model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    model.eval().save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    kind: Any = CLIPProcessor  # it has no types
    processor = kind(pictures, tokenizer)
    processor.save_pretrained(folder)
    return model, processor


def test_clip_and_pick_scores_are_cosines(tmp_path: Path) -> None:
    model, processor = tiny_clip(tmp_path)
    picture = torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    given = processor(images=picture, text=["a cat"], return_tensors="pt")
    with torch.inference_mode():
        image = model.visual_projection(model.vision_model(given["pixel_values"]).pooler_output)[0]
        text = model.text_projection(model.text_model(given["input_ids"], given["attention_mask"]).pooler_output)[0]
    cosine = float(image @ text / image.norm() / text.norm())
    assert clip_score(str(tmp_path))(picture, "a cat") == pytest.approx(max(100 * cosine, 0), abs=1e-3)
    scale = float(model.logit_scale.detach().exp())
    assert pick_score(str(tmp_path))(picture, "a cat") == pytest.approx(scale * cosine, abs=1e-4)


def test_scores_are_means_and_what_is_missing_is_named(tmp_path: Path) -> None:
    metric = Score("brightness", lambda image, caption: float(image.float().mean()) + len(caption))
    for value, caption in ((10, "a"), (20, "abc")):
        metric.add(torch.full((1, 2, 2), value, dtype=torch.uint8), caption)
    assert metric.result() == 17
    found, missing = make_metrics(["fid", "clip"], None, {"clip": str(tmp_path), "pickscore": ""})
    assert found == []
    assert missing["fid"] == "it needs --reference-stats"
    assert "is not here" in missing["clip"]
    with pytest.raises(ValueError, match="metric 'is' does not exist"):
        make_metrics(["is"], None, {})


def test_the_table_in_the_docs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- paper -->\n| old |\n<!-- end of paper -->\nafter\n")
    rows = [Row("sequential", 48.0, 1.0, 1.0, {"FID": 0.0}), Row("window, n = 4", 17.0, 0.4, 2.5, {"FID": 1.23456})]
    write_table(rows, 20, page)
    lines = page.read_text().splitlines()
    assert lines[2] == "| 20 samples of digits | rounds | FID |"
    assert lines[4:6] == ["| sequential | 48 | 0.000 |", "| window, n = 4 | 17 | 1.235 |"]
    assert (lines[0], lines[-1]) == ("before", "after")
