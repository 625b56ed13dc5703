"""Detection of classes that were patched after their import, since workers import them unpatched."""

from __future__ import annotations

import sys
import types

LIBRARIES = {
    "accelerate",
    "bitsandbytes",
    "diffusers",
    "huggingface_hub",
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
    # Generated methods, such as those of dataclasses, also have the class's module.
    return innermost == cls.__module__ and chain[-1].__qualname__ in (f"{cls.__qualname__}.{name}", name)
