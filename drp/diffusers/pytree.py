"""Trees: the arguments and results of a module as a JSON description and a list of tensors."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Json = Any
"""A JSON value."""

PLAIN = (bool, int, float, str, type(None))


class UnknownValueError(ValueError):
    """A value without a description. The message says what and where it is."""


def flatten(value: Any, path: str = "") -> tuple[Json, list[Tensor], list[str]]:
    """Return a description of nested containers, the tensors in it and their paths; `rebuild` reverses it.

    Raises UnknownValueError for a value that is neither a container, a tensor nor a plain value.
    """
    tensors: list[Tensor] = []
    paths: list[str] = []

    def walk(value: Any, path: str) -> Json:
        kind = type(value)
        if kind in PLAIN:
            return value
        if isinstance(value, Tensor):
            tensors.append(value)
            paths.append(path)
            return {"tensor": len(tensors) - 1}
        if kind in (list, tuple, torch.Size):
            items = [walk(item, f"{path}[{i}]") for i, item in enumerate(value)]
            return {"list" if kind is list else "tuple": items}
        if isinstance(value, dict):
            items = [[_key(k, path), walk(v, f"{path}.{k}" if path else str(k))] for k, v in value.items()]
            return {"map": items} if kind is dict else {"record": name_of(kind), "items": items}
        if kind in (torch.dtype, torch.device):
            return {kind.__name__: str(value).removeprefix("torch.")}
        raise UnknownValueError(f"{path or 'an argument'} is a {kind.__name__}, which cannot be sent to workers")

    return walk(value, path), tensors, paths


def rebuild(description: Json, tensors: Sequence[Tensor]) -> Any:
    """Return the value that `flatten` described, with these tensors."""
    if not isinstance(description, dict):
        return description
    if "record" in description:  # such as an output of diffusers: a mapping that can be constructed from its items
        return pkgutil.resolve_name(description["record"])(**{k: rebuild(v, tensors) for k, v in description["items"]})
    ((kind, content),) = description.items()
    makers: dict[str, Callable[[], Any]] = {
        "tensor": lambda: tensors[content],
        "list": lambda: [rebuild(item, tensors) for item in content],
        "tuple": lambda: tuple(rebuild(item, tensors) for item in content),
        "map": lambda: {k: rebuild(v, tensors) for k, v in content},
        "dtype": lambda: getattr(torch, content),
        "device": lambda: torch.device(content),
    }
    return makers[kind]()


def name_of(thing: Any) -> str:
    """Return `module:qualified.name` of a class or function, as `pkgutil.resolve_name` reads it.

    Raises UnknownValueError if it is not found there.
    """
    name = f"{getattr(thing, '__module__', '')}:{getattr(thing, '__qualname__', '')}"
    if name.startswith("__main__:"):
        raise UnknownValueError(f"{name} is defined in the main script, which workers do not run; put it into a module")
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not thing:
        raise UnknownValueError(f"{thing!r:.80} cannot be imported by its name")
    return name


def _key(key: Any, path: str) -> Any:
    if type(key) not in PLAIN:
        raise UnknownValueError(f"{path or 'an argument'} has the key {key!r:.40}, which cannot be sent to workers")
    return key
