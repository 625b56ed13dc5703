"""Structure: a module as it is, described so that another process can make it again, without pickles.

What is described is the tree of live objects: classes by name, attributes, and which tensor goes where. A LoRA that was
loaded, attention processors that were exchanged or layers that were fused are therefore part of it, whoever did it.
"""

from __future__ import annotations

import enum
import functools
import operator
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from drp.diffusers.features import LEFT_OUT, add_cast, casts_of
from drp.diffusers.patched import methods_of, patched_method
from drp.diffusers.pytree import PLAIN, Json, UnknownValueError, find, name_of


class PatchedClassError(UnknownValueError):
    """A class was changed in this process, which workers would not see."""


HOOKS = tuple(name for name, value in vars(nn.Module()).items() if name.endswith("hooks") and isinstance(value, dict))
PARTS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
FORBIDDEN = {
    "_hf_hook": "it is offloaded or dispatched by accelerate; keep it in memory, and call remove_all_hooks()",
    "hf_quantizer": "it is quantised",
    "quantization_config": "it is quantised",
}
TENSORS = (Tensor, nn.Parameter)


class Described:
    """A module's description, as JSON, and the `tensors` in it, each once."""

    def __init__(self, json: Json, tensors: list[Tensor], containers: Sequence[Any]) -> None:
        self.json, self.tensors = json, tensors
        self._containers = [(container, _items(container)) for container in containers]
        self._pointers: list[int] = []
        self.note_pointers()

    def note_pointers(self) -> None:
        """Take it that the tensors are where they belong."""
        self._pointers = [tensor.data_ptr() for tensor in self.tensors]
        self._noted = [tensor.detach() for tensor in self.tensors]

    def untouched(self) -> bool:
        """Return whether every attribute is still the same object, and every tensor where it was: a quick look."""
        here = all(map(operator.eq, self._pointers, (tensor.data_ptr() for tensor in self.tensors)))
        return here and all(_identical(_items(container), items) for container, items in self._containers)

    def same(self, other: Described) -> bool:
        """Return whether a later description is of the same structure and the same tensors, or of equal ones."""
        if self.json != other.json:
            return False
        pairs = zip(self._noted, other.tensors, strict=True)
        return all(a.data_ptr() == b.data_ptr() or equal_bits(a, b) for a, b in pairs)

    def take(self, other: Described) -> None:
        """Take over what a later look at the same structure has found; this stays the same object.

        Parameters that lie elsewhere with the same values (they were cast to and fro, say) are put back.
        """
        for noted, tensor in zip(self._noted, other.tensors, strict=True):
            if isinstance(tensor, nn.Parameter) and tensor.data_ptr() != noted.data_ptr():
                tensor.data = noted
        other.note_pointers()
        self._noted = other._noted
        self.json, self.tensors = other.json, other.tensors
        self._containers, self._pointers = other._containers, other._pointers


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same, also of dtypes that torch does not compare."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.element_size() == 1 and a.dtype.is_floating_point:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a module's forward is its class's, also if the object holds it: removed hooks leave it there."""
    forward = vars(module).get("forward")
    if forward is None:
        return True
    own = getattr(forward, "__self__", None) is module
    return own and getattr(forward, "__func__", None) is type(module).forward


def _items(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, Mapping) else list(container)


def _identical(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def describe(module: nn.Module, ours: Callable[[Any], bool] = lambda value: False) -> Described:
    """Describe a module.

    `ours` says which attributes are left out. Raises UnknownValueError, saying what and where, for a module that
    another process could not make again as it is: hooked, offloaded, compiled, quantised, or with attributes of kinds
    that have no description.
    """
    describer = _Describer(ours)
    root = describer.value(module, type(module).__name__)
    return Described({"objects": describer.objects, "root": root}, describer.tensors, describer.containers)


class _Describer:
    def __init__(self, ours: Callable[[Any], bool]) -> None:
        self.objects: list[Json] = []
        self.tensors: list[Tensor] = []
        self.containers: list[Any] = []
        self._ours = ours
        self._places: dict[int, int] = {}
        self._tensor_places: dict[int, int] = {}
        self._kinds: set[type] = set()
        self._alive: list[Any] = []  # an id is an object's only while it lives

    def value(self, value: Any, path: str) -> Json:
        kind = type(value)
        if kind in PLAIN:
            return value
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if kind in (list, dict, OrderedDict):
            self.containers.append(value)
        if kind in (list, tuple, torch.Size, set, frozenset):
            items = sorted(value, key=repr) if kind in (set, frozenset) else value
            name = "tuple" if kind is torch.Size else kind.__name__
            return {name: [self.value(item, f"{path}[{i}]") for i, item in enumerate(items)]}
        if kind in (dict, OrderedDict):
            return {kind.__name__: [[self.value(k, path), self.value(v, f"{path}.{k}")] for k, v in value.items()]}
        if kind in (torch.dtype, torch.device):
            return {kind.__name__: str(value).removeprefix("torch.")}
        if isinstance(value, enum.Enum):
            return {"enum": [name_of(kind), value.name]}
        if isinstance(value, functools.partial):
            return {"partial": [self.value(part, path) for part in (value.func, value.args, value.keywords)]}
        if isinstance(value, types.MethodType):
            return {"method": [self.value(value.__self__, path), value.__name__]}
        if isinstance(value, type) or (callable(value) and not hasattr(value, "__dict__")):
            return {"name": _named(value, path)}
        if isinstance(value, types.FunctionType):
            return {"name": _named(value, path)}
        return self._object(value, path)

    def _tensor(self, tensor: Tensor, path: str) -> Json:
        if type(tensor) not in TENSORS and type(tensor).__name__ not in ("Buffer", "UninitializedParameter"):
            raise UnknownValueError(f"{path} is a {type(tensor).__name__}: quantised or otherwise special weights")
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise UnknownValueError(f"{path} is on {tensor.device} ({tensor.layout}); workers take dense CPU tensors")
        place = self._tensor_places.setdefault(id(tensor), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(tensor)
        # torch chooses some kernels by whether a weight requires a gradient, even where none is recorded.
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "tensor"
        return {"trained" if kind == "parameter" and tensor.requires_grad else kind: place}

    def _object(self, value: Any, path: str) -> Json:
        if id(value) not in self._places:
            self._places[id(value)] = len(self.objects)
            self._alive.append(value)
            self.objects.append(None)
            self.objects[self._places[id(value)]] = self._describe(value, path)
        return {"object": self._places[id(value)]}

    def _check_class(self, kind: type, path: str) -> None:
        """See that a class is as its module has defined it, and note its methods to see later changes."""
        if kind in self._kinds:
            return
        self._kinds.add(kind)
        if (method := patched_method(kind)) is not None:
            raise PatchedClassError(
                f"{path}: {method} was exchanged in the class after its module was imported, and workers import the "
                "class without that; undo it, or make a subclass in a module of its own"
            )
        self.containers += methods_of(kind)

    def _describe(self, value: Any, path: str) -> Json:
        kind = type(value)
        self._check_class(kind, path)
        if isinstance(value, nn.Module):
            return self._module(value, path)
        name = _named(kind, path)
        if not hasattr(value, "__dict__") or kind.__module__ == "builtins":
            raise UnknownValueError(f"{path} is a {kind.__name__}, which cannot be described")
        items = (
            [[k, self.value(v, f"{path}.{k}")] for k, v in value.items()] if isinstance(value, OrderedDict) else None
        )
        state = [[k, self.value(v, f"{path}.{k}")] for k, v in vars(value).items()]
        if isinstance(value, (dict, list, tuple, set)) and items is None:
            raise UnknownValueError(f"{path} is a {kind.__name__}, which cannot be described")
        return {"class": name, "state": state, "items": items}

    def _module(self, module: nn.Module, path: str) -> Json:
        state = []
        casts = casts_of(module, path)
        self.containers += [vars(module), *(getattr(module, part) for part in PARTS[:3])]
        for name, value in vars(module).items():
            if name in FORBIDDEN and value is not None:
                raise UnknownValueError(f"{path}: {FORBIDDEN[name]}")
            if name in HOOKS:
                if value:
                    raise UnknownValueError(f"{path} has forward hooks, which stay in this process; remove them")
            elif name == "_compiled_call_impl":
                if value is not None:
                    raise UnknownValueError(f"{path} is compiled; leave that to the workers' own process")
            elif name == "forward":
                if self._ours(value) or casts or has_own_forward(module):
                    continue
                raise UnknownValueError(f"{path}.forward was exchanged on the object, by a hook or by hand; undo that")
            elif name not in (*PARTS, *LEFT_OUT) and not self._ours(value):
                state.append([name, self.value(value, f"{path}.{name}")])
        parts = {
            part: [[name, self.value(value, f"{path}.{name}")] for name, value in getattr(module, part).items()]
            for part in PARTS[:3]
        }
        fleeting = sorted(module._non_persistent_buffers_set)
        kind = _named(type(module), path)
        return {"module": kind, "state": state, "fleeting": fleeting, "casts": casts, **parts}


def _named(thing: Any, path: str) -> str:
    try:
        return name_of(thing)
    except UnknownValueError as error:
        raise UnknownValueError(f"{path}: {error}") from None


def make(description: Json, tensors: Sequence[Tensor]) -> nn.Module:
    """Return the module that `describe` described, with these tensors in it."""
    module = _Maker(description["objects"], tensors).value(description["root"])
    assert isinstance(module, nn.Module)
    return module


class _Maker:
    def __init__(self, objects: Sequence[Json], tensors: Sequence[Tensor]) -> None:
        self._objects, self._tensors = objects, tensors
        self._made: dict[int, Any] = {}
        self._parameters: dict[int, nn.Parameter] = {}

    def value(self, description: Json) -> Any:
        if not isinstance(description, dict):
            return description
        ((kind, content),) = description.items()
        make: Callable[[Any], Any] = getattr(self, f"_make_{kind}")
        return make(content)

    def _items(self, content: Json) -> list[Any]:
        return [self.value(item) for item in content]

    def _pairs(self, content: Json) -> list[tuple[Any, Any]]:
        return [(self.value(k), self.value(v)) for k, v in content]

    def _make_list(self, content: Json) -> Any:
        return self._items(content)

    def _make_tuple(self, content: Json) -> Any:
        return tuple(self._items(content))

    def _make_set(self, content: Json) -> Any:
        return set(self._items(content))

    def _make_frozenset(self, content: Json) -> Any:
        return frozenset(self._items(content))

    def _make_dict(self, content: Json) -> Any:
        return dict(self._pairs(content))

    def _make_OrderedDict(self, content: Json) -> Any:  # noqa: N802  # named after the class
        return OrderedDict(self._pairs(content))

    def _make_dtype(self, content: str) -> Any:
        return getattr(torch, content)

    def _make_device(self, content: str) -> Any:
        return torch.device(content)

    def _make_enum(self, content: Json) -> Any:
        return find(content[0])[content[1]]

    def _make_partial(self, content: Json) -> Any:
        function, arguments, keywords = self._items(content)
        return functools.partial(function, *arguments, **keywords)

    def _make_method(self, content: Json) -> Any:
        return getattr(self.value(content[0]), content[1])

    def _make_name(self, content: str) -> Any:
        return find(content)

    def _make_tensor(self, place: int) -> Tensor:
        return self._tensors[place]

    def _make_parameter(self, place: int, trained: bool = False) -> nn.Parameter:
        if place not in self._parameters:
            self._parameters[place] = nn.Parameter(self._tensors[place], requires_grad=trained)
        return self._parameters[place]

    def _make_trained(self, place: int) -> nn.Parameter:
        return self._make_parameter(place, trained=True)

    def _make_object(self, place: int) -> Any:
        if place not in self._made:
            description = self._objects[place]
            cls = find(description["module" if "module" in description else "class"])
            self._made[place] = made = cls.__new__(cls)
            (self._fill_module if "module" in description else self._fill)(made, description)
        return self._made[place]

    def _fill(self, made: Any, description: Json) -> None:
        for name, value in description["items"] or ():
            OrderedDict.__setitem__(made, name, self.value(value))
        made.__dict__.update({name: self.value(value) for name, value in description["state"]})

    def _fill_module(self, made: nn.Module, description: Json) -> None:
        nn.Module.__init__(made)
        for part in PARTS[:3]:
            getattr(made, part).update({name: self.value(value) for name, value in description[part]})
        made._non_persistent_buffers_set.update(description["fleeting"])
        made.__dict__.update({name: self.value(value) for name, value in description["state"]})
        for storage, compute in description["casts"]:
            add_cast(made, getattr(torch, storage), getattr(torch, compute))
