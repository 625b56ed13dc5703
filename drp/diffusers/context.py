"""The state that all calls of a pipeline share."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from drp.diffusers.compiled import OriginalForward
from drp.diffusers.evaluators import Evaluator
from drp.diffusers.pipeline_modes import Modes
from drp.diffusers.pytree import Json
from drp.diffusers.structure import Described
from drp.models.gpu import synchronize


@dataclass(frozen=True)
class PipelineContext:
    """The state that all calls of a pipeline share: its `modules` by name, and by which source workers find each.

    modes: the mode for schedulers that add noise (True), and that for others.
    split: whether to evaluate the branches of guidance on different devices.
    describe: returns the current state of a module, the same object as long as nothing has changed.
    unchanged: returns whether a module is as it was described last.
    """

    pipe: Any
    modes: Modes
    modules: Mapping[str, OriginalForward]
    evaluator: Evaluator
    split: bool
    always_draft: bool
    describe: Callable[[str], Described]
    publish: Callable[[str, Described], Json]
    unchanged: Callable[[str], bool]
    config_of: Callable[[str], Mapping[str, Any]]

    def evaluate(
        self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any], gpus: Collection[torch.device]
    ) -> tuple[Any, float]:
        """Evaluate a module in this process; return its result and the time, for which `gpus` are waited for."""
        for gpu in gpus:
            synchronize(gpu)
        began = time.perf_counter()
        result = self.modules[module](*args, **kwargs)
        for gpu in gpus:
            synchronize(gpu)
        return result, time.perf_counter() - began
