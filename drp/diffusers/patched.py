"""Classes that were changed after their import, since workers import them unchanged."""

from __future__ import annotations

import sys
import types
from typing import Any

from drp.diffusers.pytree import PLAIN

LIBRARIES = {
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "huggingface_hub",
    "numpy",
    "peft",
    "torch",
    "torchao",
    "transformers",
    "typing_extensions",
}
"""Packages whose functions are part of classes from the start, such as decorators."""
KNOWN = LIBRARIES | sys.stdlib_module_names - {"__main__"}


def patched_method(cls: type) -> str | None:
    """Return the name of a patched method in a class's own attributes, None if there is none.

    A method is the class's own if it was defined in the class's module under the class's name. Decorators may come
    from the same package or from a library. Attributes set by `functools.wraps` are ignored.
    """
    for name, value in vars(cls).items():
        if isinstance(value, types.FunctionType) and not _is_own(cls, name, value):
            return f"{cls.__qualname__}.{name}"
    return None


Values = tuple[tuple[str, Any], ...]
Namespace = type | types.ModuleType


def namespaces_of(cls: type) -> list[Namespace]:
    """Return a class and the module that defines it, none for a class of a library."""
    if cls.__module__.partition(".")[0] in KNOWN:
        return []
    module = sys.modules.get(cls.__module__)
    return [cls] if module is None else [cls, module]


def values_of(namespace: Namespace) -> Values:
    """Return the attributes of a class, or the global variables of a module, that are numbers or text."""
    return tuple((k, v) for k, v in vars(namespace).items() if type(v) in PLAIN and not k.startswith("__"))


def set_values(namespace: Namespace, values: Values) -> None:
    """Set the values that `values_of` has returned, perhaps in another process."""
    for name, value in values:
        if vars(namespace).get(name) != value:
            setattr(namespace, name, value)


def _is_own(cls: type, name: str, function: types.FunctionType) -> bool:
    package = cls.__module__.partition(".")[0]
    chain = [function]
    while isinstance(inner := getattr(chain[-1], "__wrapped__", None), types.FunctionType):
        chain.append(inner)
    *wrappers, innermost = (f.__globals__.get("__name__", "") for f in chain)
    if any(w.partition(".")[0] not in KNOWN and w.partition(".")[0] != package for w in wrappers):
        return False
    if innermost.partition(".")[0] in KNOWN:
        return True
    # Generated methods, such as those of dataclasses, also have the class's module. Of `__repr__`, which dataclasses
    # wrap, only the wrapper has the method's name.
    names = {f"{cls.__qualname__}.{name}", name}
    return innermost == cls.__module__ and not names.isdisjoint((chain[0].__qualname__, chain[-1].__qualname__))
