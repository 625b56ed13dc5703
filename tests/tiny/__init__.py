"""Every pipeline class of diffusers for which a small configuration is known, without text encoders or downloads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers


@dataclass(frozen=True)
class Case:
    """A pipeline class of diffusers: what makes its components, and how it is called."""

    components: Callable[[], dict[str, Any]]
    options: dict[str, Any]

    def make(self, name: str) -> Any:
        """Build the pipeline of a class, after whose name a comma and a variant may stand.

        Components that are not given are None.
        """
        kind = getattr(diffusers, name.partition(",")[0])
        needed = [p.name for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
        pipe = kind(**{**dict.fromkeys(needed), **self.components()})
        pipe.set_progress_bar_config(disable=True)
        return pipe
