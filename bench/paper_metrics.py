"""The metrics of the paper: FID, CLIP score, PickScore and HPSv2, each from a kept package or model."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.quality import frechet_of_moments

Features = Callable[[Tensor], Tensor]
"""Returns the features [B, d] of pictures, uint8 [B, C, H, W]."""


class MissingError(Exception):
    """Why a metric cannot be computed here."""


class Metric(ABC):
    """A figure of a set of pictures; `better` says whether it is to be lower or higher."""

    name: str
    better: str = "higher"

    @abstractmethod
    def add(self, image: Tensor, caption: str) -> None:
        """Take a picture, uint8 [C, H, W], into account."""

    @abstractmethod
    def result(self) -> float:
        """Return the figure of all pictures since the last call."""


class Frechet(Metric):
    """FID (Heusel et al. 2017): the Frechet distance of features to reference statistics, `mu` [d], `sigma` [d, d]."""

    better = "lower"

    def __init__(self, features: Features, mu: Tensor, sigma: Tensor, name: str = "FID") -> None:
        self.name = name
        self._features, self._mu, self._sigma = features, mu.double(), sigma.double()
        self._seen: list[Tensor] = []

    def add(self, image: Tensor, caption: str) -> None:
        self._seen.append(self._features(image[None]).double())

    def result(self) -> float:
        found, self._seen = torch.cat(self._seen), []
        return frechet_of_moments(found.mean(0), torch.cov(found.T), self._mu, self._sigma)


class Score(Metric):
    """The mean of a score of a picture with its caption."""

    def __init__(self, name: str, score: Callable[[Tensor, str], float]) -> None:
        self.name, self._score = name, score
        self._seen: list[float] = []

    def add(self, image: Tensor, caption: str) -> None:
        self._seen.append(self._score(image, caption))

    def result(self) -> float:
        found, self._seen = sum(self._seen) / len(self._seen), []
        return found


def clip_score(path: str) -> Callable[[Tensor, str], float]:
    """Return 100 max(cos(image, text), 0) of a CLIP model (Hessel et al. 2021)."""
    cosine, _ = _cosine(path)
    return lambda image, caption: max(100 * cosine(image, caption), 0.0)


def pick_score(path: str) -> Callable[[Tensor, str], float]:
    """Return PickScore (Kirstain et al. 2023): the cosine times the model's temperature."""
    cosine, scale = _cosine(path)
    return lambda image, caption: scale * cosine(image, caption)


def _cosine(path: str) -> tuple[Callable[[Tensor, str], float], float]:
    """Return the cosine of a picture's and a text's embeddings, and the exponential of the model's logit scale."""
    from transformers import AutoProcessor, CLIPModel

    kind: Any = AutoProcessor  # it has no types
    try:
        model: Any = CLIPModel.from_pretrained(path, local_files_only=True)
        processor = kind.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise MissingError(f"{path} is not here: {str(error).splitlines()[0]}") from None
    model.eval().requires_grad_(False)

    def cosine(image: Tensor, caption: str) -> float:
        given = processor(images=image.expand(3, -1, -1), text=[caption], return_tensors="pt", truncation=True)
        with torch.inference_mode():
            found = model(**given)
        return float(torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)[0])

    return cosine, float(model.logit_scale.exp())


def hps_v2() -> Callable[[Tensor, str], float]:
    """Return HPSv2.1 (Wu et al. 2023), by its authors' package, times 100 as the paper has it."""
    if importlib.util.find_spec("hpsv2") is None:
        raise MissingError("hpsv2 is not installed: pip install 'draft-refine[paper]'")
    import hpsv2
    from PIL import Image

    def score(image: Tensor, caption: str) -> float:
        picture = Image.fromarray(image.movedim(0, -1).numpy())
        return 100 * float(hpsv2.score([picture], caption, hps_version="v2.1")[0])

    return score


def inception() -> Features:
    """Return the features of torch-fidelity's Inception v3, whose weights are FID's."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise MissingError("torch-fidelity is not installed: pip install 'draft-refine[paper]'")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])

    def features(images: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = network(images)[0]
        return found

    return features


def reference_stats(path: Path) -> tuple[Tensor, Tensor]:
    """Return `mu` and `sigma` of an .npz file, as tools for FID write it."""
    with np.load(path) as file:
        if not {"mu", "sigma"} <= set(file.files):
            raise MissingError(f"{path} holds {', '.join(file.files)}; reference statistics are mu and sigma")
        return torch.from_numpy(file["mu"]), torch.from_numpy(file["sigma"])


def make_metrics(names: list[str], stats: Path | None, paths: Mapping[str, str]) -> tuple[list[Metric], dict[str, str]]:
    """Return the metrics that can be computed here, and by name why the others cannot."""

    def frechet() -> Metric:
        if stats is None:
            raise MissingError("it needs --reference-stats")
        return Frechet(inception(), *reference_stats(stats))

    makers: dict[str, Callable[[], Metric]] = {
        "fid": frechet,
        "clip": lambda: Score("CLIP", clip_score(paths["clip"])),
        "pickscore": lambda: Score("PickScore", pick_score(paths["pickscore"])),
        "hpsv2": lambda: Score("HPSv2.1", hps_v2()),
    }
    found, missing = [], {}
    for name in names:
        if name not in makers:
            raise ValueError(f"metric {name!r} does not exist; choose from {', '.join(makers)}")
        try:
            found.append(makers[name]())
        except MissingError as reason:
            missing[name] = str(reason)
    return found, missing
