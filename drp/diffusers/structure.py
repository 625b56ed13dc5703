"""The structure of a module, pickled without its tensors, so that a worker can rebuild it around the same weights.

As in `torch.save`, the pickle has persistent ids in place of tensors, whose memory is shared. The live objects are
pickled, including loaded LoRAs, replaced attention processors, fused layers and quantized weights. A pickle reaches a
worker through this process's shared memory, signed with the key that `multiprocessing` gives its children when they
start, and never through a socket.

The reducers of `torch.multiprocessing` are not used for the tensors: they share each storage by itself, with a
descriptor for each on the host and a reference counter for each reader on a GPU, and a U-Net has 1,700.
"""

from __future__ import annotations

import io
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drp.diffusers.compiled import COMPILED, compile_in_worker, options_of
from drp.diffusers.contents import HOOKS, Contents, has_only_attributes, state_of
from drp.diffusers.features import LEFT_OUT, add_cast, casts_of
from drp.diffusers.offload import is_held
from drp.diffusers.patched import Namespace, Values, namespaces_of, patched_method, set_values, values_of
from drp.diffusers.pytree import UnknownValueError, name_of


class PatchedClassError(UnknownValueError):
    """A class was changed in this process. Workers do not see the change."""


FORBIDDEN = {
    "_hf_hook": "it is offloaded or dispatched by accelerate; call pipe.remove_all_hooks() and pipe.to('cuda'), or "
    "offload whole models, by pipe.enable_model_cpu_offload()"
}
PARTS = ("_parameters", "_buffers", "_modules")
PLAIN_TENSORS = (Tensor, nn.Parameter, getattr(nn, "Buffer", Tensor))  # nn.Buffer is there since torch 2.5.
SINGLETONS = (type(None), type(...), type(NotImplemented))
UNCHANGING = (torch.Size, torch.dtype, torch.layout, torch.memory_format)
NAMED = (type, types.FunctionType, types.BuiltinFunctionType)


class Described:
    """A module's pickle, and its distinct `tensors`, which are not pickled. `is_weight` marks parameters."""

    def __init__(
        self,
        pickled: bytes,
        tensors: list[Tensor],
        is_weight: list[bool],
        containers: Sequence[Any],
        namespaces: Mapping[Namespace, Values],
        opaque: Sequence[Any],
    ) -> None:
        self.pickled, self.tensors, self.is_weight, self._namespaces = pickled, tensors, is_weight, namespaces
        self._opaque, self._state = opaque, state_of(opaque)
        """Objects that may change without a change of a container, such as random number generators; their state."""
        self._contents = Contents(containers)
        self._pointers: list[int] = []
        self.note_pointers()

    def note_pointers(self) -> None:
        """Record the current places of the tensors as the expected ones."""
        self._pointers = [tensor.data_ptr() for tensor in self.tensors]
        self._versions = list(map(_version, self.tensors))
        with plain_tensors():
            self._noted = [
                tensor.detach() if weight else tensor.detach().clone()
                for tensor, weight in zip(self.tensors, self.is_weight, strict=True)
            ]

    @contextmanager
    def moving(self) -> Iterator[None]:
        """Allow tensors to be moved in a `with` block.

        References to their former memory are dropped first, so that each is freed as soon as its tensor has moved.
        """
        self._noted = []
        try:
            yield
        finally:
            self.note_pointers()

    def untouched(self) -> bool:
        """Return whether every attribute is the same object, and every tensor at the same place and not written to.

        This is fast. Writes to a tensor's `data` are not counted by torch.
        """
        return (
            self._pointers == list(map(Tensor.data_ptr, self.tensors))
            and self._versions == list(map(_version, self.tensors))
            and self._contents.untouched()
            and (not self._opaque or self._state == state_of(self._opaque))
        )

    def restore_namespaces(self) -> None:
        """Give the classes and Python modules of the program the values that they had."""
        for namespace, values in self._namespaces.items():
            set_values(namespace, values)

    def same(self, other: Described) -> bool:
        """Return whether a later description has the same structure and equal tensors.

        Weights that were written to in place differ, since predictions were made with their former values.
        """
        if self.pickled != other.pickled:
            return False
        versions = zip(self._versions, other._versions, self.is_weight, strict=True)
        if any(is_weight and before != after for before, after, is_weight in versions):
            return False
        pairs = zip(self._noted, other.tensors, strict=True)
        return all(a.data_ptr() == b.data_ptr() or equal_bits(a, b) for a, b in pairs)

    def follow(self, describe_now: Callable[[], Described]) -> bool:
        """Return whether the module is as described, and update the description if only caches or places differ."""
        if self.untouched():
            return True
        now = describe_now()
        if not self.same(now):
            return False
        self._update_from(now)
        return True

    def _update_from(self, other: Described) -> None:
        """Update this object by a later description of the same structure.

        Parameters that moved but have the same values, for example after casts, are restored to their places.
        """
        for noted, tensor, is_weight in zip(self._noted, other.tensors, other.is_weight, strict=True):
            if is_weight and tensor.data_ptr() != noted.data_ptr():
                with plain_tensors():
                    tensor.data = noted
        other.note_pointers()
        vars(self).update(vars(other))


def _version(tensor: Tensor) -> int | None:
    """Return how often a tensor was written to, None for tensors of inference mode, whose writes are not counted."""
    return None if tensor.is_inference() else tensor._version


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Ignore `__torch_function__` during a block, so that tensor subclasses are accessed by their storage."""
    with torch._C.DisableTorchFunctionSubclass():
        yield


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, including dtypes that torch does not compare."""
    with plain_tensors():
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return False
        if a.element_size() == 1 and a.dtype.is_floating_point:
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        return torch.equal(a, b)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether a module's forward is its class's, even as an attribute, as removed hooks leave it."""
    forward = vars(module).get("forward")
    if forward is None:
        return True
    own = getattr(forward, "__self__", None) is module
    return own and getattr(forward, "__func__", None) is type(module).forward


def describe(module: nn.Module, ours: Callable[[Any], bool] = lambda value: False, compiled: Any = None) -> Described:
    """Describe a module.

    `ours` returns whether to leave out an attribute; `compiled` is the result of torch.compile for the module, if any.
    Raises UnknownValueError, with the name of the attribute, for a module that another process cannot rebuild: one that
    is hooked or offloaded, or has attributes that cannot be pickled.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, module, ours, compiled)
    try:
        pickler.dump(module)
        found = [(n, values) for n, values in pickler.namespaces.items() if values]
        pickler.dump(tuple((n if isinstance(n, type) else n.__name__, values) for n, values in found))
        parts = pickler.tensors, pickler.is_weight, pickler.containers, pickler.namespaces, pickler.opaque
        return Described(file.getvalue(), *parts)
    except UnknownValueError as error:
        if str(error).startswith(type(module).__name__):
            raise
        raise type(error)(f"{_find_culprit(module, ours)}: {error}") from error
    except Exception as error:  # Objects that cannot be pickled may raise any error.
        raise UnknownValueError(f"{_find_culprit(module, ours)} cannot be sent to workers: {error}") from error


def _find_culprit(root: nn.Module, ours: Callable[[Any], bool]) -> str:
    """Return the path of the first attribute of a module that cannot be pickled, else the module's name."""
    for path, module in root.named_modules():
        attributes = {k: v for k, v in vars(module).items() if k not in (*PARTS, "forward") and not ours(v)}
        for name, value in (attributes | module._parameters | module._buffers).items():
            try:
                _Pickler(io.BytesIO(), root, ours).dump(value)
            except Exception:
                return ".".join(filter(None, [type(root).__name__, path, name]))
    return type(root).__name__


class _Pickler(pickle.Pickler):
    """Pickles a module without its tensors. A persistent id is ("device", name) or the arguments of `_Tensors.make`."""

    def __init__(self, file: io.BytesIO, root: nn.Module, ours: Callable[[Any], bool], compiled: Any = None) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._root, self._compiled = root, compiled
        self.tensors: list[Tensor] = []
        self.is_weight: list[bool] = []
        self.containers: list[Any] = []
        self.opaque: list[Any] = []
        self.namespaces: dict[Namespace, Values] = {}
        """The numbers and text in the classes of objects, and in the Python modules that define these."""
        self._ours = ours
        name = type(root).__name__
        self._paths = {id(module): f"{name}.{path}" if path else name for path, module in root.named_modules()}
        self._weights = {id(parameter) for parameter in root.parameters()}
        self._places: dict[int, int] = {}
        self._kinds: set[type] = set()

    def persistent_id(self, value: Any) -> Any:
        """Return the persistent id of a tensor or a device; record containers, which may change later."""
        kind = type(value)
        if kind in (dict, list, OrderedDict, set):
            self.containers.append(value)
            if kind is set and value:  # Of the many empty ones, the length is compared.
                self.opaque.append(value)
        elif kind is torch.device:
            # A GPU's number differs between processes, and a worker has one GPU.
            return "device", value.type if value.type == "cuda" else str(value)
        elif isinstance(value, Tensor) and not hasattr(value, "__tensor_flatten__"):  # which consists of others
            return self._tensor(value)
        return None

    def reducer_override(self, value: Any) -> Any:
        """Return how to reduce an object that pickle cannot reduce correctly; check that others can be unpickled."""
        kind = type(value)
        if isinstance(value, NAMED):
            if value not in SINGLETONS:
                name_of(value)  # Raises for a class that a worker cannot import.
            return NotImplemented
        if isinstance(value, types.MethodType):
            name, owner = value.__name__ if hasattr(value, "__name__") else "", value.__self__
            own = name and getattr(getattr(owner, name, None), "__func__", None) is value.__func__
            return (getattr, (owner, name)) if own else (_bind, (value.__func__, owner))
        self._check_class(kind)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, Tensor):
            self._check_device(value)
            if id(value) in self._weights:
                # The tensors of which it consists, such as those of a quantized weight, are weights too.
                self._weights |= {id(inner) for inner in vars(value).values() if isinstance(inner, Tensor)}
        else:
            if hasattr(value, "__dict__"):
                self.containers.append(vars(value))
            if not (kind.__name__ == "FrozenDict" or kind in UNCHANGING or has_only_attributes(value)):
                self.opaque.append(value)
        return NotImplemented

    def _tensor(self, tensor: Tensor) -> tuple[Any, ...]:
        self._check_device(tensor)
        place = self._places.setdefault(id(tensor), len(self.tensors))
        if place == len(self.tensors):
            self.tensors.append(tensor)
            self.is_weight.append(id(tensor) in self._weights)
        if type(tensor) not in PLAIN_TENSORS:
            self._check_class(type(tensor))
            return "tensor", place, tensor.requires_grad, type(tensor), dict(vars(tensor))
        # The choice of some kernels depends on requires_grad, even if no gradient is recorded.
        return "tensor", place, tensor.requires_grad, type(tensor), None

    def _check_device(self, tensor: Tensor) -> None:
        if tensor.device.type not in ("cpu", "cuda") or tensor.layout != torch.strided:
            raise UnknownValueError(
                f"a weight is on {tensor.device} ({tensor.layout}); workers take dense tensors on cores and GPUs"
            )

    def _check_class(self, kind: type) -> None:
        """Check that a class and its bases are unpatched, and record their attributes to detect later changes."""
        if kind in self._kinds:
            return
        for cls in kind.__mro__[:-1]:
            if cls in self._kinds:
                continue
            self._kinds.add(cls)
            if (method := patched_method(cls)) is not None:
                raise PatchedClassError(
                    f"{method} was replaced in the class after its module was imported, and workers import the "
                    "class without that; undo it, or define a subclass in a module"
                )
            own = namespaces_of(cls)
            # Classes of one Python module share it: its variables are watched once.
            self.containers += [vars(n) for n in dict.fromkeys((cls, *own)) if n not in self.namespaces]
            self.namespaces |= {n: values_of(n) for n in own}

    def _module(self, module: nn.Module) -> Any:
        path, state = self._paths.get(id(module), type(module).__name__), {}
        casts = casts_of(module, path)
        self.containers.append(vars(module))
        for name, value in vars(module).items():
            if name in FORBIDDEN and is_held(module):
                continue
            if name in FORBIDDEN and value is not None:
                raise UnknownValueError(f"{path}: {FORBIDDEN[name]}")
            if name in HOOKS:
                if value:
                    raise UnknownValueError(f"{path} has forward hooks, which stay in this process; remove them")
            elif name == "forward":
                if not (self._ours(value) or casts or has_own_forward(module)):
                    raise UnknownValueError(
                        f"{path}.forward was replaced on the object, by a hook or by hand; undo that"
                    )
            elif name not in LEFT_OUT and not self._ours(value):
                state[name] = value
        compiled = options_of(state.pop(COMPILED, None) or (self._compiled if module is self._root else None), path)
        # Not as a dict and a list, which would be recorded as containers of the module.
        return _blank, (type(module),), (tuple(state.items()), tuple(casts), compiled), None, None, _fill


def _bind(function: Any, owner: Any) -> types.MethodType:
    """Return a method with a function other than its class's. It may be a `functools.partial`, as in torchao."""
    return types.MethodType(function, owner)


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Return a module of a class without calling its __init__."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    return made


def _fill(module: nn.Module, packed: tuple[tuple[tuple[str, Any], ...], Any, dict[str, Any] | None]) -> None:
    """Set a module's attributes, and apply its casts and its compilation."""
    state, casts, compiled = packed
    vars(module).update(state)
    for storage, compute in casts:
        add_cast(module, getattr(torch, storage), getattr(torch, compute))
    if compiled is not None:
        compile_in_worker(module, compiled)


def make(pickled: bytes, tensors: Sequence[Tensor]) -> nn.Module:
    """Return the module that `describe` described, with these tensors. The pickle must be trusted."""
    unpickler = _Unpickler(io.BytesIO(pickled), tensors)
    module = unpickler.load()
    for namespace, values in unpickler.load():
        set_values(sys.modules[namespace] if isinstance(namespace, str) else namespace, values)
    assert isinstance(module, nn.Module)
    return module


def copy_of(described: Described) -> nn.Module:
    """Return another module like the one described, with the same weights and other tensors of its own."""
    pairs = zip(described.tensors, described.is_weight, strict=True)
    with plain_tensors():
        tensors = [tensor.detach() if is_weight else tensor.detach().clone() for tensor, is_weight in pairs]
    return make(described.pickled, tensors)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._made: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Any:
        """Return the object of a persistent id: a device of this process, or a tensor, one object for each place."""
        if pid[0] == "device":
            return torch.device(pid[1])
        _, place, requires_grad, kind, attributes = pid
        if place not in self._made:
            self._made[place] = _tensor_of(kind, self._tensors[place], requires_grad, attributes)
        return self._made[place]


def _tensor_of(kind: type, tensor: Tensor, requires_grad: bool, attributes: Mapping[str, Any] | None) -> Tensor:
    if kind is nn.Parameter:
        return nn.Parameter(tensor, requires_grad)
    if attributes is None:
        return tensor.requires_grad_(requires_grad)
    made: Tensor = torch.Tensor._make_subclass(kind, tensor, requires_grad)
    vars(made).update(attributes)
    return made
