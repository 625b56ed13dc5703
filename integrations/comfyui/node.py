"""Node: takes one of ComfyUI's samplers and returns it with draft and refine around it."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from drp.sampling.drafts import RULES
from drp.sampling.mode_selection import make_mode
from drp.sampling.modes import Mode

from .devices import evaluator
from .sampler import DraftedRun

log = logging.getLogger(__name__)

UNSUITED = {
    "lcm": "it makes new noise of its estimate of the data at every step",
    "cfg_pp": "it needs the unguided prediction of the very latents",
    "dpm_adaptive": "it chooses its steps by what the model returns",
}
"""Why samplers with these words in the names of their functions are left as they are."""

KINDS = {"CONST": "flow", "V_PREDICTION": "v", "EDM": "v", "X0": "sample", "IMG_TO_IMG": "sample", "EPS": "epsilon"}
"""What networks predict, by the class of ComfyUI's that says how their output is read."""


class DraftAndRefine:
    """Evaluates several steps of a sampling run at once, at drafts of their latents."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = "sampling/custom_sampling/samplers"
    DESCRIPTION = "Drafts several steps ahead and evaluates them at once; the given sampler refines them."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI asks for it by this name
        """Return the inputs, as ComfyUI describes them."""
        return {
            "required": {
                "sampler": ("SAMPLER",),
                "drafts": ("INT", {"default": 4, "min": 1, "max": 32, "tooltip": "Steps evaluated at once."}),
                "mode": (
                    ["window", "aggressive", "conservative"],
                    {"tooltip": "window: nearest to the sequential image; aggressive: fewest rounds."},
                ),
            },
            "optional": {
                "rule": (
                    ["default", *RULES],
                    {"tooltip": "What drafts assume of the steps ahead; the default depends on the sampler's noise."},
                ),
                "devices": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Devices with a copy of the model each, such as cuda:0,cuda:1, beginning with the "
                        "model's own. Empty: all drafts as one batch on its own device.",
                    },
                ),
                "batch": ("BOOLEAN", {"default": True, "tooltip": "Off: drafts one after another, to save memory."}),
            },
        }

    def get_sampler(
        self, sampler: Any, drafts: int, mode: str, rule: str = "default", devices: str = "", batch: bool = True
    ) -> tuple[Any]:
        """Return a sampler that drafts; raise ValueError for devices that there are not."""
        function = getattr(sampler, "sampler_function", None)
        if function is None:
            raise ValueError(f"{type(sampler).__name__} is not a sampler with a function; connect a KSamplerSelect")
        name = getattr(function, "__name__", "")
        why = next((reason for word, reason in UNSUITED.items() if word in name), "")
        if why:
            log.warning("drp: %s is left as it is: %s", name, why)
            return (sampler,)
        places = [place.strip() for place in devices.split(",") if place.strip()]
        for place in places:
            _check_device(place)
        chosen = None if rule == "default" else rule
        made = make_mode(mode, drafts, 0.0, chosen, adds_noise=adds_noise(function, sampler.extra_options))
        drafted = functools.partial(sample_drafted, function, made, places, batch)
        return (comfy.samplers.KSAMPLER(drafted, sampler.extra_options, sampler.inpaint_options),)


def sample_drafted(
    function: Any, mode: Mode, devices: list[str], batch: bool, model: Any, x: Tensor, sigmas: Tensor, **rest: Any
) -> Tensor:
    """Run a sampler function of ComfyUI with draft and refine; what follows `batch` is what such a function takes."""
    prediction_type = _prediction_type(model)
    evaluate = evaluator(model, devices, batch)
    check = comfy.model_management.throw_exception_if_processing_interrupted
    run = DraftedRun(function, mode, evaluate, model, prediction_type, prediction_type == "flow", check)
    try:
        return run.sample(x, sigmas, **rest)
    finally:
        evaluate.close()
        without = f"; without drafts: {run.reason}" if run.reason else ""
        log.info("drp: %d evaluations in %d rounds%s", run.calls, run.rounds, without)


def _prediction_type(model: Any) -> str:
    """Return the prediction type of a network; an unknown one counts as "sample", whose output is carried unchanged."""
    names = {cls.__name__ for cls in type(model.inner_model.inner_model.model_sampling).__mro__}
    return next((kind for name, kind in KINDS.items() if name in names), "sample")


def adds_noise(function: Any, options: Mapping[str, Any]) -> bool:
    """Return whether a sampler function adds noise with these options.

    Those that can either take a `noise_sampler`, and then an `eta` which scales the noise, or they have `s_churn`.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    given = {**defaults, **options}
    if "noise_sampler" in defaults:
        return bool(given.get("eta", 1.0) and given.get("s_noise", 1.0))
    return bool("s_churn" in defaults and given["s_churn"])


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"devices has {name!r}, which torch cannot use here ({error}); give names such as cuda:0"
        ) from None


NODE_CLASS_MAPPINGS = {"DraftAndRefine": DraftAndRefine}
NODE_DISPLAY_NAME_MAPPINGS = {"DraftAndRefine": "Draft and refine (drp)"}
