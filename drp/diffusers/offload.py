"""Pipelines whose models accelerate moves to the device one at a time (`enable_model_cpu_offload`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


class ModelOffload:
    """Holds the denoising modules on their device, where workers share them; the other models stay offloaded.

    accelerate links the models' hooks in the order in which they run: each hook offloads the model before its own.
    While the denoisers are held they are left out of that chain, and `offload_previous_models` offloads the models that
    run before them.
    """

    def __init__(self, pipe: Any, names: Sequence[str]) -> None:
        self._pipe = pipe
        self._modules = [getattr(pipe, name) for name in names]
        hooks = list(getattr(pipe, "_all_hooks", []))
        self._held = [hook for hook in hooks if any(hook.model is module for module in self._modules)]
        self._others = [hook for hook in hooks if hook not in self._held]

    def enter(self) -> None:
        """Move the denoisers to their device and hold them there."""
        for user in self._held:
            module: nn.Module = user.model
            for name in ("forward", "_old_forward"):
                vars(module).pop(name, None)
            module.to(user.hook.execution_device)
        for user in self._others:
            while user.hook.prev_module_hook in self._held:
                user.hook.prev_module_hook = user.hook.prev_module_hook.hook.prev_module_hook
        if self._held:
            vars(self._pipe)["maybe_free_model_hooks"] = self._offload_others

    def offload_previous_models(self) -> None:
        """Offload what ran before the denoisers."""
        for user in self._held:
            before = user.hook.prev_module_hook
            if before is not None and before not in self._held and is_on_device(before.model):
                before.offload()

    def _offload_others(self) -> None:
        """Offload all models but the denoisers, as the pipeline does at the end of a call."""
        for user in self._others:
            user.offload()

    def leave(self) -> None:
        """Have accelerate offload all models again."""
        if self._held:
            vars(self._pipe).pop("maybe_free_model_hooks", None)
            self._pipe.enable_model_cpu_offload(device=self._pipe._offload_device)


def is_on_device(module: nn.Module) -> bool:
    """Return whether a model is not on the host."""
    return any(parameter.device.type != "cpu" for parameter in module.parameters())


def is_held(module: nn.Module) -> bool:
    """Return whether a module has the hook of accelerate that `ModelOffload` leaves, which does nothing."""
    return type(vars(module).get("_hf_hook")).__name__ == "CpuOffload" and "_old_forward" not in vars(module)
