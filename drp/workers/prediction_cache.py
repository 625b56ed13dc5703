"""A cache of a denoiser's predictions, for emulated devices with `values=recorded`."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor

from drp.models.registry import Predict

MAX_NBYTES = 256 << 20
"""Bytes of predictions that a worker keeps; those that were not asked for the longest go first."""


class PredictionCache:
    """Evaluates a denoiser once for each combination of draft, timestep and conditions, compared by their bits."""

    def __init__(self, predict: Predict, max_nbytes: int = MAX_NBYTES) -> None:
        self._predict, self._max_nbytes = predict, max_nbytes
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()
        self._nbytes = 0

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the cached prediction, or evaluate the denoiser."""
        key = digest({"x": x, "t": t, **{f"cond {name}": value for name, value in cond.items()}})
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        predicted = self._predict(x, t, cond)
        self._known[key] = predicted.clone()
        self._nbytes += predicted.nbytes
        while self._nbytes > self._max_nbytes:
            self._nbytes -= self._known.popitem(last=False)[1].nbytes
        return predicted


def digest(tensors: Mapping[str, Tensor]) -> bytes:
    """Return a digest of 16 bytes of CPU tensors: their names, dtypes, shapes and values."""
    made = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        made.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return made.digest()
