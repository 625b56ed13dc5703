"""The contents of the containers of a module, to detect at every step whether one was replaced."""

from __future__ import annotations

import io
import operator
import pickle
import types
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict))


class Contents:
    """The contents of containers: dicts, lists and the attributes of classes, and the lengths of sets.

    They are compared at every step, and SDXL's U-Net has 14,000 containers. The loops are therefore those of the
    interpreter, and the dicts of hooks, half of all containers, are compared by way of others.
    """

    def __init__(self, containers: Sequence[Any]) -> None:
        self._containers = list(containers)
        dicts = [c for c in containers if isinstance(c, dict)]
        self._dicts = [c for c in dicts if "_forward_hooks" not in c]
        self._attributes = [
            (operator.itemgetter(*(name for name in c if name not in HOOKS)), c) for c in dicts if "_forward_hooks" in c
        ]
        """Functions that return the replaceable containers of modules, and the containers."""
        self._lists = [c for c in containers if isinstance(c, list)]
        self._tables = [c for c in containers if isinstance(c, types.MappingProxyType)]
        self._lengths, self._items = list(map(len, self._containers)), list(self._all())
        self._hooks = RemovableHandle.next_id

    def _all(self) -> Iterator[Any]:
        attributes = [values(c) for values, c in self._attributes]
        tables = map(types.MappingProxyType.values, self._tables)
        return chain.from_iterable(chain(attributes, map(dict.values, self._dicts), self._lists, tables))

    def untouched(self) -> bool:
        """Return whether every container has the same objects, and no hook was registered."""
        if self._hooks != RemovableHandle.next_id or self._lengths != list(map(len, self._containers)):
            return False
        try:
            return all(map(operator.is_, self._items, self._all()))
        except KeyError:  # An attribute was replaced by another one.
            return False


def has_only_attributes(value: Any) -> bool:
    """Return whether an object's state is in its `__dict__`: not in slots, items, or memory of a class written in C."""
    reduced = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    make, args, state, *items = reduced if isinstance(reduced, tuple) and len(reduced) > 2 else (None, None, None)
    is_plain = getattr(make, "__name__", "") == "__newobj__" and args == (type(value),) and not any(items)
    return is_plain and hasattr(value, "__dict__") and (state is None or state is vars(value))


def state_of(objects: Sequence[Any]) -> bytes:
    """Return the state of objects such as arrays and random number generators, to compare it later."""
    file = io.BytesIO()
    _StatePickler(file, pickle.HIGHEST_PROTOCOL).dump(list(objects))
    return file.getvalue()


class _StatePickler(pickle.Pickler):
    """Pickles tensors by their content. Modules and parameters are compared elsewhere, and pickled by their ids."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, (nn.Module, nn.Parameter)):
            return id(value)
        if isinstance(value, Tensor):
            data = value.detach().reshape(-1).view(torch.uint8).cpu().numpy()
            return str(value.dtype), *value.shape, data.tobytes()
        return None
