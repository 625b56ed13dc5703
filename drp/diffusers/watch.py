"""Watched methods of a scheduler, replaced on the object to observe their calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

METHODS = ("step", "set_timesteps")
"""The watched methods."""

Notify = Callable[[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]], Any]
"""Called with the original method and the arguments of a call, in place of the method."""


class WatchedMethod:
    """Replaces one method of one scheduler.

    A deep copy of the scheduler gets the method of its class: a pipeline may copy its scheduler, for example for a
    second kind of latents, and steps of the copy must not step the original.
    """

    def __init__(self, scheduler: Any, name: str, notify: Notify) -> None:
        self._scheduler, self._name, self._notify = scheduler, name, notify
        self.own = vars(scheduler).get(name)
        """The object's attribute before, if it had one in place of its class's method."""
        self._original = getattr(scheduler, name)
        functools.update_wrapper(self, self._original, updated=())  # The original may be a WatchedMethod.
        setattr(scheduler, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the observer, which calls the original."""
        return self._notify(self._original, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = memo.get(id(self._scheduler))
        return self if owner is None else getattr(type(owner), self._name).__get__(owner)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._scheduler, self._name)

    def undo(self) -> None:
        """Restore the object."""
        vars(self._scheduler).pop(self._name, None)
        if self.own is not None:
            setattr(self._scheduler, self._name, self.own)


def is_scheduler(component: Any) -> bool:
    """Return whether a component is a scheduler whose steps can be watched."""
    return all(callable(getattr(component, name, None)) for name in METHODS) and hasattr(component, "config")


def schedulers_of(pipe: Any) -> Iterator[Any]:
    """Yield a pipeline's schedulers, the one named `scheduler` first."""
    yield from schedulers_by_name(pipe).values()


def schedulers_by_name(pipe: Any) -> dict[str, Any]:
    """Return a pipeline's schedulers by the names of their attributes, the one named `scheduler` first."""
    components = {"scheduler": getattr(pipe, "scheduler", None), **getattr(pipe, "components", {})}
    return {name: component for name, component in components.items() if is_scheduler(component)}


def replaced_method(scheduler: Any) -> str | None:
    """Return the name of a method that was replaced on the object, None if there is none."""
    kind = type(scheduler)
    name: str
    for name, value in vars(scheduler).items():
        own = value
        while isinstance(own, WatchedMethod):  # Several observers may be nested.
            own = own.own
        if own is not None and callable(getattr(kind, name, None)) and not _is_own(scheduler, name, own):
            return name
    return None


def _is_own(scheduler: Any, name: str, value: Any) -> bool:
    """Return whether a value is the method of the object's class."""
    return getattr(value, "__self__", None) is scheduler and value.__func__ is getattr(type(scheduler), name, None)
