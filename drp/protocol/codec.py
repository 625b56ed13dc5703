"""Conversion of dataclasses to MessagePack bytes and back, with every field checked against its annotation.

A message is a map of its fields and `type`. The supported annotations are:

    Annotated[int, Bounds(0, 9)]       a whole number within bounds; a float within bounds is also finite
    Annotated[str, Length(64)]         at most 64 characters; for a tuple items, for bytes bytes
    Literal["a", "b"]                  one of these strings
    bool, X | None, tuple[X, ...], a nested dataclass
    int | float | str | bytes | bool | tuple | dataclass
                                       unions of these, which MessagePack distinguishes

Anything else in a decoded message (a missing or unknown field, another type, a value out of bounds) raises
`ProtocolError`. Decoding executes no code: MessagePack has none, and extension types are refused.
"""

from __future__ import annotations

import dataclasses
import math
import struct
import types
import typing
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import msgpack

from drp.errors import ProtocolError

MAX_MESSAGE = 1 << 20
"""Maximum number of bytes of a message."""

_SCALARS = frozenset({int, float, str, bool, type(None)})

Checker = Callable[[Any], Any]
Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Inclusive bounds of a number."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Length:
    """The maximum length of a string, a tuple or bytes."""

    max: int


def encode(message: object) -> bytes:
    """Encode a message, a dataclass; raise ProtocolError if a field is out of bounds."""
    flat = _flat.get(type(message))
    if flat is not None and (packed := flat.pack(message)) is not None:
        return packed
    fields = to_fields(message)
    _record_checker(type(message))(fields)
    data: bytes = msgpack.packb({"type": type(message).__name__, **fields})
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"a {type(message).__name__} of {len(data)} bytes; a message has at most {MAX_MESSAGE}")
    return data


def is_text(text: str) -> bool:
    """Whether a message can contain a string. Lone surrogates, as in undecodable file names, cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_fields(record: Any) -> dict[str, Any]:
    """Convert a dataclass to dicts and lists."""
    values = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return {name: value if type(value) in _SCALARS else _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return to_fields(value) if dataclasses.is_dataclass(value) else value


def decode(data: bytes, kinds: Mapping[str, type[Record]]) -> Record:
    """Decode a message of one of `kinds`, which maps class names to classes."""
    if len(data) > MAX_MESSAGE:
        raise ProtocolError(f"a message of {len(data)} bytes; at most {MAX_MESSAGE}")
    for flat in _flat_by_size.get(len(data), ()):
        if kinds.get(flat.kind.__name__) is flat.kind and (message := flat.unpack(data)) is not None:
            return message  # type: ignore[no-any-return]  # of the kind that was asked for
    try:
        fields = msgpack.unpackb(data, strict_map_key=True, raw=False, max_ext_len=0)
    except Exception as error:  # msgpack raises many kinds, some of them bare ValueErrors
        raise ProtocolError(f"not MessagePack: {error}") from None
    if not isinstance(fields, dict):
        raise ProtocolError(f"a message is a map, not {type(fields).__name__}")
    name = fields.pop("type", None)
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ProtocolError(f"unknown message type {name!r:.80}")
    checked: Record = _record_checker(kind)(fields)
    return checked


class _Flat:
    """Packs and unpacks a dataclass of numbers with one `struct` call, since all its fields are at fixed offsets.

    Integers take four bytes and floats eight, even where MessagePack has a shorter encoding, and tuples are empty. For
    records that differ from this or are out of bounds, `pack` and `unpack` return None, and the general way is used.
    """

    def __init__(self, kind: type) -> None:
        self.kind = kind
        hints = typing.get_type_hints(kind, include_extras=True)
        self._numbers: list[tuple[str, Any, float, float]] = []
        self._tuples: list[str] = []
        self._texts = [bytes([0x81 + len(hints)]) + b"".join(map(msgpack.packb, ("type", kind.__name__)))]
        layout = ">"
        for name, hint in hints.items():
            number, limit = typing.get_args(hint)
            self._texts[-1] += msgpack.packb(name)
            if number in (int, float):
                assert number is float or 0 <= limit.low <= limit.high < 2**32, f"{name} does not fit four bytes"
                self._texts[-1] += b"\xce" if number is int else b"\xcb"
                layout += f"{len(self._texts[-1])}s{'I' if number is int else 'd'}"
                self._numbers.append((name, number, limit.low, limit.high))
                self._texts.append(b"")
            else:
                self._texts[-1] += b"\x90"
                self._tuples.append(name)
        self._struct = struct.Struct(f"{layout}{len(self._texts[-1])}s")

    @property
    def size(self) -> int:
        return self._struct.size

    def pack(self, record: object) -> bytes | None:
        """Pack a record; return None if it must be encoded in the general way."""
        for name in self._tuples:
            if getattr(record, name):
                return None
        parts: list[Any] = []
        for text, (name, number, low, high) in zip(self._texts, self._numbers, strict=False):
            value: Any = getattr(record, name)
            if type(value) is not number or not low <= value <= high:
                return None
            parts += (text, value)
        return self._struct.pack(*parts, self._texts[-1])

    def unpack(self, data: bytes) -> Any:
        """Unpack a record; return None if the bytes must be decoded in the general way."""
        parts = self._struct.unpack(data)
        if list(parts[::2]) != self._texts:
            return None
        values = parts[1::2]
        for value, (_, _, low, high) in zip(values, self._numbers, strict=True):
            if not low <= value <= high:
                return None
        return self.kind(*values)


_flat: dict[type, _Flat] = {}
_flat_by_size: defaultdict[int, list[_Flat]] = defaultdict(list)


def numbers(kind: type[Record]) -> type[Record]:
    """Mark a dataclass of numbers, followed by tuples that default to (), for a faster encoding."""
    flat = _flat[kind] = _Flat(kind)
    _flat_by_size[flat.size].append(flat)
    return kind


_checkers: dict[type, Checker] = {}


def _record_checker(kind: type) -> Checker:
    """Return a function that converts a dict to a `kind`; it is created on first use and cached."""
    if kind not in _checkers:
        hints = typing.get_type_hints(kind, include_extras=True)
        checkers = {name: _checker(hint) for name, hint in hints.items()}

        def check(fields: Any) -> Any:
            if not isinstance(fields, dict) or fields.keys() != checkers.keys():
                got = sorted(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
                raise ProtocolError(f"{kind.__name__} has the fields {sorted(checkers)}, not {got!s:.200}")
            values = {}
            for name, value in fields.items():
                try:
                    values[name] = checkers[name](value)
                except ProtocolError as error:
                    raise ProtocolError(f"{kind.__name__}.{name}: {error}") from None
            return kind(**values)

        _checkers[kind] = check
    return _checkers[kind]


def _checker(hint: Any) -> Checker:
    """Return a function that checks a value against an annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _record_checker(hint)
    if origin is Annotated:
        return _limited(arguments[0], arguments[1])
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments)
    if origin is typing.Literal:
        words = " or ".join(arguments)
        return lambda value: value if isinstance(value, str) and value in arguments else _refuse(value, words)
    if hint is bool:
        return lambda value: value if isinstance(value, bool) else _refuse(value, "true or false")
    raise TypeError(f"the codec cannot check {hint}")


def _one_of(hints: tuple[Any, ...]) -> Checker:
    """Return a function that checks a value against the annotation for its type among several."""
    checkers: dict[type, Checker] = {_wire_type(hint): _checker(hint) for hint in hints if hint is not type(None)}
    if len(checkers) == 1 and type(None) in hints:
        (inner,) = checkers.values()  # a float may come as a whole number
        return lambda value: None if value is None else inner(value)
    if type(None) in hints:
        checkers[type(None)] = lambda value: None

    def check(value: Any) -> Any:
        checker = checkers.get(type(value))
        return checker(value) if checker else _refuse(value, " or ".join(kind.__name__ for kind in checkers))

    return check


def _wire_type(hint: Any) -> type:
    """Return the Python type to which msgpack decodes values of an annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _wire_type(arguments[0])
    if origin is tuple:
        return list
    kind: type = dict if dataclasses.is_dataclass(hint) else hint
    return kind


def _limited(hint: Any, limit: Any) -> Checker:
    if typing.get_origin(hint) is tuple:
        item = _checker(typing.get_args(hint)[0])

        def check_tuple(value: Any) -> Any:
            if not isinstance(value, list) or len(value) > limit.max:
                _refuse(value, f"a list of at most {limit.max} items")
            return tuple(item(v) for v in value) if value else ()

        return check_tuple
    if hint is bytes:

        def check_bytes(value: Any) -> Any:
            fits = isinstance(value, bytes) and len(value) <= limit.max
            return value if fits else _refuse(value, f"at most {limit.max} bytes")

        return check_bytes
    if hint is str:

        def check_text(value: Any) -> Any:
            return (
                value
                if isinstance(value, str) and len(value) <= limit.max
                else _refuse(value, f"text of at most {limit.max} characters")
            )

        return check_text
    number: tuple[type, ...] = (int, float) if hint is float else (int,)

    def check_number(value: Any) -> Any:
        fits = isinstance(value, number) and not isinstance(value, bool) and limit.low <= value <= limit.high
        return value if fits and math.isfinite(value) else _refuse(value, f"{limit.low:g} to {limit.high:g}")

    return check_number


def _refuse(value: Any, wanted: str) -> typing.NoReturn:
    raise ProtocolError(f"{value!r:.80} is not {wanted}")
