"""Examples: of every message some, made from the annotations of its fields."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

import msgpack

from drp.protocol import client_messages, messages
from drp.protocol.codec import Bounds, Length, encode, to_fields

PROTOCOLS: Mapping[str, tuple[Mapping[str, type], Mapping[str, type]]] = {
    "worker": (messages.TO_WORKER, messages.TO_LEADER),
    "client": (client_messages.TO_SERVER, client_messages.TO_CLIENT),
}

SIZES = ("least", "middle", "most")
"""All fields as small as they may be; something ordinary; numbers as large as they may be, and nothing left out."""


def examples(protocol: str) -> dict[str, Any]:
    """Return messages by name, such as `Draft/least`."""
    kinds = {name: kind for direction in PROTOCOLS[protocol] for name, kind in direction.items()}
    made = {f"{name}/{size}": _record(kind, size) for name, kind in kinds.items() for size in SIZES}
    if protocol == "client":
        values: list[Any] = [3, -1, 0.5, 2.0, "karras", True, (14.6, 0.03)]
        options = tuple(client_messages.Option(f"option{i}", value) for i, value in enumerate(values))
        made["Submit/default"] = client_messages.Submit(request=7, labels=(3, 1, 4))
        made["Submit/options"] = client_messages.Submit(
            request=8, shape=(1, 8, 8), solver_options=options, rule="paper"
        )
    return made


def refused() -> dict[str, tuple[bytes, str]]:
    """Return bytes that are no message, by name, and why."""
    found: dict[str, tuple[bytes, str]] = {}
    for protocol, directions in PROTOCOLS.items():
        for name, kind in (item for direction in directions for item in direction.items()):
            good = {"type": name, **to_fields(_record(kind, "middle"))}
            changes: dict[str, tuple[Any, str]] = {"surplus": (good | {"surplus": 1}, "a field that it does not have")}
            hints = _hints(kind)
            if hints:
                last = list(hints)[-1]
                changes["missing"] = ({k: v for k, v in good.items() if k != last}, f"{last} is missing")
            for field, hint in hints.items():
                limit = typing.get_args(hint)[1] if typing.get_origin(hint) is typing.Annotated else None
                if isinstance(limit, Bounds):
                    changes["low"] = (good | {field: int(limit.low) - 1}, f"{field} is below its bounds")
                    changes["type"] = (good | {field: "1"}, f"{field} is text")
                    break
            for change, (fields, why) in changes.items():
                found[f"{protocol}/{name}/{change}"] = (msgpack.packb(fields), why)
    found["any/empty"] = (b"", "no bytes")
    found["any/list"] = (msgpack.packb(["Draft"]), "not a map")
    found["any/nameless"] = (msgpack.packb({"run": 1}), "no type")
    found["any/unknown"] = (msgpack.packb({"type": "Drift"}), "no such type")
    found["any/extension"] = (msgpack.packb({"type": msgpack.ExtType(5, b"12345678")}), "an extension type")
    found["any/two"] = (encode(messages.Stop()) * 2, "two messages in one frame")
    return found


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def _record(kind: type, size: str) -> Any:
    return kind(**{name: _value(hint, size, name) for name, hint in _hints(kind).items()})


def _value(hint: Any, size: str, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _record(hint, size)
    if origin is typing.Annotated:
        return _limited(arguments[0], arguments[1], size, name)
    if origin is typing.Literal:
        return arguments[-1] if size == "most" else arguments[0]
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and size == "least":
            return None
        kinds = [each for each in arguments if each is not type(None)]
        return _value(kinds[-1] if size == "most" else kinds[0], size, name)
    return size != "least"


def _limited(hint: Any, limit: Bounds | Length, size: str, name: str) -> Any:
    if isinstance(limit, Bounds):
        if hint is int:
            return {"least": int(limit.low), "middle": max(int(limit.low), min(300, int(limit.high)))}.get(
                size, int(limit.high)
            )
        return {"least": float(limit.low), "middle": max(limit.low, min(0.1, limit.high))}.get(size, float(limit.high))
    if hint is bytes:
        return {"least": b"", "middle": name.encode()}.get(size, bytes(range(192, 256))[: limit.max])
    if hint is str:
        return {"least": "", "middle": name}.get(size, "żółw ∂ 亀"[: limit.max])
    item = typing.get_args(hint)[0]
    count = {"least": 0, "middle": 1}.get(size, min(3, limit.max))
    return tuple(_value(item, size, name) for _ in range(count))
