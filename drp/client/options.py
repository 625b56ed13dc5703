"""Options: a run's, as Python has them, into a message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from drp.leader.request import Options, Request
from drp.protocol.door import Condition, Option, Rule, Submit
from drp.protocol.tensors import Frame, Frames
from drp.sampling.drafts import DraftRule


def to_submit(number: int, given: Options, ways: Mapping[str, Any]) -> tuple[Submit, list[Frame]]:
    """Return a Submit and its tensors; raise ValueError, with the remedy, for what cannot be said in one.

    `ways` are the fields of Submit that are no options: how the client wants to hear of the run.
    """
    request = Request(**given)  # refuses names that there are not
    if request.callback is not None or request.out is not None:
        raise ValueError(
            "callback and out are for a leader in this process; iterate over client.submit(...).progress(), and copy "
            "result.samples"
        )
    for name in ("solver", "mode"):
        value = getattr(request, name)
        if not isinstance(value, str):
            raise ValueError(f"{name} is an object, {value!r:.80}; a server takes the name of one of its own")
    frames = Frames()
    fields: dict[str, Any] = {**given}
    fields["labels"] = None if request.labels is None else tuple(_list(request.labels))
    fields["shape"] = None if request.shape is None else tuple(request.shape)
    fields["cond"] = tuple(Condition(name, frames.add(_tensor(name, each))) for name, each in request.cond.items())
    for name, value in (("noise", request.noise), ("image", request.image)):
        fields[name] = None if value is None else frames.add(_tensor(name, value))
    fields["grid"] = _named("grid", request.grid)
    fields["solver_options"] = _named("solver_options", request.solver_options)
    fields["tolerance"] = None if request.tolerance == math.inf else request.tolerance
    if isinstance(request.rule, DraftRule):
        fields["rule"] = Rule(request.rule.carry, request.rule.slope)
    for name in ("callback", "out"):
        fields.pop(name, None)
    return Submit(request=number, **fields, **ways), frames.frames


def _list(values: Any) -> list[Any]:
    values = values.tolist() if isinstance(values, (Tensor, np.ndarray)) else values
    return [value.item() if isinstance(value, np.generic) else value for value in values]


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}; give a tensor")
    return value


def _named(what: str, options: Mapping[str, Any]) -> tuple[Option, ...]:
    return tuple(Option(name, _value(what, name, value)) for name, value in options.items())


def _value(what: str, name: str, value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple, np.ndarray, Tensor)):
        return tuple(float(each) for each in _list(value))
    raise ValueError(f"{what}[{name!r}] is {value!r:.80}; a server takes numbers, text and lists of numbers")
