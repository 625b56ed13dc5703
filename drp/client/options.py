"""Conversion of the options of a run to a message."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

import numpy as np

from drp.protocol.arrays import add_array
from drp.protocol.client_messages import Condition, Option, Rule, Submit
from drp.protocol.frames import Frame, FrameWriter
from drp.sampling.drafts import RULES, DraftRule
from drp.sampling.options import RunOptions, check_names


class SubmitArguments(RunOptions, total=False):
    """The options of a run, see `drp.leader.request.Request`. Arrays may be of numpy or torch."""

    labels: Sequence[int] | Any | None
    cond: Mapping[str, Any]
    solver: str
    noise: Any | None
    image: Any | None
    mode: str


REPORTING: Final = ("progress", "previews", "timeline", "memory")
"""The fields of a Submit that are not options of the run: how its progress and its samples are returned."""

DEFAULTS: Final = {field.name: field.default for field in fields(Submit)}


def to_submit(number: int, given: SubmitArguments, reporting: Mapping[str, Any]) -> tuple[Submit, list[Frame]]:
    """Return a Submit and copies of its tensors; raise ValueError for options that a message cannot hold.

    `reporting` has the fields of Submit that are named in `REPORTING`.
    """
    for name in given:
        if name in ("callback", "out"):
            raise ValueError(
                "callback and out are for a leader in this process; iterate over client.submit(...).progress(), and "
                "copy result.samples"
            )
    check_names(given, [*SubmitArguments.__annotations__])
    options: dict[str, Any] = {name: given.get(name, DEFAULTS[name]) for name in SubmitArguments.__annotations__}
    for name in ("solver", "mode"):
        if not isinstance(options[name], str):
            raise ValueError(f"{name} is an object, {options[name]!r:.80}; a server takes the name of one of its own")
    for name in ("grid", "solver_options", "cond"):
        if not isinstance(options[name] or {}, Mapping):
            raise ValueError(f"{name} is {options[name]!r:.80}; give a mapping of names to values")
    options = {name: _number(value) for name, value in options.items()}
    writer = FrameWriter()
    for name in ("labels", "shape"):
        options[name] = None if options[name] is None else tuple(_list(name, options[name]))
    cond = dict(options["cond"] or {})
    options["cond"] = tuple(Condition(name, add_array(writer, name, each)) for name, each in cond.items())
    for name in ("noise", "image"):
        options[name] = None if options[name] is None else add_array(writer, name, options[name])
    for name in ("grid", "solver_options"):
        options[name] = _named(name, dict(options[name] or {}))
    options["tolerance"] = None if options["tolerance"] == math.inf else options["tolerance"]
    options["offsets"] = _offsets(options["offsets"])
    options["rule"] = _rule(options["rule"])
    # The frames are sent later, in another thread, and the caller may change its arrays as soon as `submit` returns.
    return Submit(request=number, **options, **reporting), [bytes(frame) for frame in writer.frames]


def _offsets(offsets: str | Sequence[int] | None) -> Any:
    return offsets if offsets is None or isinstance(offsets, str) else tuple(_list("offsets", offsets))


def _rule(rule: str | DraftRule | None) -> str | Rule | None:
    if not isinstance(rule, DraftRule):
        return rule
    for name, known in RULES.items():
        if rule == known:
            return name
    if type(rule) is not DraftRule or isinstance(rule.carry, tuple) or isinstance(rule.slope, tuple):
        raise ValueError(
            f"rule is {rule!r:.80}; a server takes {', '.join(RULES)}, or a DraftRule with one carry and one slope"
        )
    return Rule(float(rule.carry), float(rule.slope), rule.axis)


def _list(name: str, values: Any) -> list[Any]:
    values = values.tolist() if hasattr(values, "tolist") else values  # an array
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {values!r:.80}; give a list of numbers")
    return [_number(value) for value in values]


def _number(value: Any) -> Any:
    """Return a number of numpy's or torch's as one of Python's, and other values unchanged."""
    return value.item() if isinstance(value, np.generic) or getattr(value, "shape", None) == () else value


def _named(what: str, options: Mapping[str, Any]) -> tuple[Option, ...]:
    return tuple(Option(name, _value(what, name, value)) for name, value in options.items())


def _value(what: str, name: str, value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)) or hasattr(value, "tolist"):
        return tuple(float(each) for each in _list(name, value))
    raise ValueError(f"{what}[{name!r}] is {value!r:.80}; a server takes numbers, text and lists of numbers")
