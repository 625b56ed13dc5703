"""Devices: evaluates ComfyUI's model at several drafts, as batches on one device or with a copy of it on each.

The model is what ComfyUI hands to a sampler function: it holds the guider as `inner_model`, which holds the conditions
`conds` and the network.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


class OneDevice:
    """Evaluates drafts as batches on the model's own device.

    ComfyUI decides by the first sigma of a batch which conditions and ControlNets are active, so a batch holds only
    drafts for which the same are.
    """

    def __init__(self, model: Any, batch: bool = True) -> None:
        self._model, self._batch = model, batch

    def __call__(self, xs: Sequence[Tensor], sigmas: Sequence[Tensor], extra: Mapping[str, Any]) -> list[Tensor]:
        """Return the denoised latents [B, ...] of each input."""
        groups: dict[Any, list[int]] = {}
        bounds = list(_bounds(getattr(self._model.inner_model, "conds", {})))
        for i, sigma in enumerate(sigmas):
            level = float(sigma[0])
            active = tuple((level > bound, level < bound) for bound in bounds)
            groups.setdefault(active if self._batched(xs[i], extra) else i, []).append(i)
        results: dict[int, Tensor] = {}
        for members in groups.values():
            x = torch.cat([xs[i] for i in members]) if len(members) > 1 else xs[members[0]]
            sigma = torch.cat([sigmas[i] for i in members]) if len(members) > 1 else sigmas[members[0]]
            results.update(zip(members, self._model(x, sigma, **extra).chunk(len(members)), strict=True))
        return [results[i] for i in range(len(xs))]

    def _batched(self, x: Tensor, extra: Mapping[str, Any]) -> bool:
        """Return whether drafts may be one batch: the picture to be inpainted is not repeated for a larger one."""
        if not self._batch or extra.get("denoise_mask") is None:
            return self._batch
        return len(x) == 1 and "denoise_mask_function" not in extra.get("model_options", {})

    def close(self) -> None:
        """There is nothing to end."""


class SeveralDevices:
    """Evaluates each draft on a device of its own, with a copy of the model there; the first has the model itself."""

    def __init__(self, model: Any, devices: Sequence[torch.device]) -> None:
        self._models = [model, *(copy_to(model, device) for device in devices[1:])]
        self._devices = devices
        self._threads = ThreadPoolExecutor(len(devices), "drp-device")

    def __call__(self, xs: Sequence[Tensor], sigmas: Sequence[Tensor], extra: Mapping[str, Any]) -> list[Tensor]:
        """Return the denoised latents [B, ...] of each input."""
        inference = torch.is_inference_mode_enabled()  # which is a thread's own
        counts = [len(xs[i :: len(self._models)]) for i in range(len(self._models))]

        def work(number: int) -> list[Tensor]:
            device, home = self._devices[number], xs[0].device
            moved = {name: _to(value, device) for name, value in extra.items()}
            with torch.inference_mode(inference):
                mine = zip(xs[number :: len(self._models)], sigmas[number :: len(self._models)], strict=True)
                return [self._models[number](x.to(device), s.to(device), **moved).to(home) for x, s in mine]

        done = list(self._threads.map(work, (i for i, count in enumerate(counts) if count)))
        return [done[i % len(self._models)][i // len(self._models)] for i in range(len(xs))]

    def close(self) -> None:
        """End the threads and let the copies go."""
        self._threads.shutdown()
        self._models.clear()


def evaluator(model: Any, devices: Sequence[str], batch: bool) -> OneDevice | SeveralDevices:
    """Return what evaluates drafts on these devices (none: the model's own); say so where copies cannot be made."""
    if len(devices) > 1:
        why = why_not_copied(model)
        if not why:
            return SeveralDevices(model, [torch.device(device) for device in devices])
        log.warning("drp: drafts are evaluated on one device: %s", why)
    return OneDevice(model, batch)


def why_not_copied(model: Any) -> str:
    """Return what of a model and its conditions cannot be had on another device, nothing if all can."""
    for cond in _conds(getattr(model.inner_model, "conds", {})):
        for name, what in (("control", "ControlNets"), ("gligen", "GLIGEN"), ("hooks", "hooks")):
            if cond.get(name) is not None:
                return f"{what} hold state of their own"
    return ""


def copy_to(model: Any, device: torch.device) -> Any:
    """Return the model, its guider, network and conditions on another device; patches of the network are shared."""
    guider = model.inner_model
    network = guider.inner_model
    patcher = getattr(network, "current_patcher", None)
    there = copy.copy(guider)
    # The network refers to the patcher that loaded it, and that to the network: it is shared, not copied.
    there.inner_model = copy.deepcopy(network, {id(patcher): patcher} if patcher is not None else {}).to(device)
    there.conds = {name: [_to(cond, device) for cond in conds or ()] for name, conds in guider.conds.items()}
    made = copy.copy(model)
    made.inner_model = there
    for name in ("noise", "latent_image"):
        if isinstance(getattr(model, name, None), Tensor):
            setattr(made, name, getattr(model, name).to(device))
    return made


def _to(value: Any, device: torch.device) -> Any:
    """Return a value with the tensors in it on a device, also those in the conditions of a model."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _to(each, device) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to(each, device) for each in value)
    if hasattr(value, "cond"):
        made = copy.copy(value)
        made.cond = _to(value.cond, device)
        return made
    return value


def _conds(conds: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for each in conds.values():
        yield from each or ()


def _bounds(conds: Mapping[str, Any]) -> Iterator[float]:
    """Yield the noise levels at which conditions and their ControlNets begin and end."""
    for cond in _conds(conds):
        for name in ("timestep_start", "timestep_end"):
            if name in cond:
                yield float(cond[name])
        control = cond.get("control")
        while control is not None:
            yield from map(float, getattr(control, "timestep_range", None) or ())
            control = getattr(control, "previous_controlnet", None)
