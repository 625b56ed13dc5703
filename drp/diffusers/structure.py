"""Structure: a module as it is, pickled so that a worker can make it again around the same weights.

As in `torch.save`, the pickle has persistent ids in the place of tensors, whose memory is shared instead. What is
pickled is the tree of live objects, so a LoRA that was loaded, attention processors that were exchanged, layers that
were fused and quantized weights are part of it. A pickle reaches a worker through this process's shared memory, signed
with the key that `multiprocessing` gives its children when they start, and never through a socket.

The reducers of `torch.multiprocessing` are not used for the tensors: they share each storage by itself, with a
descriptor for each on the host and a reference counter for each reader on a GPU, and a U-Net has 1,700.
"""

from __future__ import annotations

import io
import operator
import pickle
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from drp.diffusers.compiled import COMPILED, compile_in_worker, options_of
from drp.diffusers.features import LEFT_OUT, add_cast, casts_of
from drp.diffusers.offload import is_held
from drp.diffusers.patched import methods_of, patched_method
from drp.diffusers.pytree import UnknownValueError, name_of


class PatchedClassError(UnknownValueError):
    """A class was changed in this process, which workers would not see."""


HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict))
FORBIDDEN = {
    "_hf_hook": "it is offloaded or dispatched by accelerate; call pipe.remove_all_hooks() and pipe.to('cuda'), or "
    "offload whole models, by pipe.enable_model_cpu_offload()"
}
PARTS = ("_parameters", "_buffers", "_modules")
PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer)
SINGLETONS = (type(None), type(...), type(NotImplemented))
NAMED = (type, types.FunctionType, types.BuiltinFunctionType)


class Described:
    """A module's pickle, and the `tensors` that it leaves out, each once; `is_weight` says which are parameters."""

    def __init__(self, pickled: bytes, tensors: list[Tensor], is_weight: list[bool], containers: Sequence[Any]) -> None:
        self.pickled, self.tensors, self.is_weight = pickled, tensors, is_weight
        self._contents = _Contents(containers)
        self._pointers: list[int] = []
        self.note_pointers()

    def note_pointers(self) -> None:
        """Take it that the tensors are where they belong."""
        self._pointers = [tensor.data_ptr() for tensor in self.tensors]
        with plain_tensors():
            self._noted = [tensor.detach() for tensor in self.tensors]

    def untouched(self) -> bool:
        """Return whether every attribute is still the same object, and every tensor where it was: a quick look."""
        return self._pointers == list(map(Tensor.data_ptr, self.tensors)) and self._contents.untouched()

    def same(self, other: Described) -> bool:
        """Return whether a later description is of the same structure and the same tensors, or of equal ones."""
        if self.pickled != other.pickled:
            return False
        pairs = zip(self._noted, other.tensors, strict=True)
        return all(a.data_ptr() == b.data_ptr() or equal_bits(a, b) for a, b in pairs)

    def take(self, other: Described) -> None:
        """Take over what a later look at the same structure has found; this stays the same object.

        Parameters that lie elsewhere with the same values (they were cast to and fro, say) are put back.
        """
        for noted, tensor, is_weight in zip(self._noted, other.tensors, other.is_weight, strict=True):
            if is_weight and tensor.data_ptr() != noted.data_ptr():
                with plain_tensors():
                    tensor.data = noted
        other.note_pointers()
        self._noted = other._noted
        self.pickled, self.tensors, self.is_weight = other.pickled, other.tensors, other.is_weight
        self._contents, self._pointers = other._contents, other._pointers


class _Contents:
    """What containers hold: dicts, lists and the tables of classes.

    A pipeline asks at every step whether it is still the same, and SDXL's U-Net has 14,000 containers. So the loops are
    the interpreter's own, and the tables of hooks, half of what there is, are not looked at where others hold them.
    """

    def __init__(self, containers: Sequence[Any]) -> None:
        self._containers = list(containers)
        dicts = [c for c in containers if isinstance(c, dict)]
        self._dicts = [c for c in dicts if "_forward_hooks" not in c]
        self._attributes = [
            (operator.itemgetter(*(name for name in c if name not in HOOKS)), c) for c in dicts if "_forward_hooks" in c
        ]
        """Of modules: what returns those that may be exchanged, and the dict."""
        self._lists = [c for c in containers if isinstance(c, list)]
        self._tables = [c for c in containers if isinstance(c, types.MappingProxyType)]
        self._lengths, self._items = list(map(len, self._containers)), list(self._all())
        self._hooks = RemovableHandle.next_id

    def _all(self) -> Iterator[Any]:
        attributes = [values(c) for values, c in self._attributes]
        tables = map(types.MappingProxyType.values, self._tables)
        return chain.from_iterable(chain(attributes, map(dict.values, self._dicts), self._lists, tables))

    def untouched(self) -> bool:
        """Return whether every container still holds the same objects, and no hook was registered anywhere."""
        if self._hooks != RemovableHandle.next_id or self._lengths != list(map(len, self._containers)):
            return False
        try:
            return all(map(operator.is_, self._items, self._all()))
        except KeyError:  # An attribute is gone, and another one is there.
            return False


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Have torch take tensors of classes with a `__torch_function__` of their own for what they lie in memory as."""
    with torch._C.DisableTorchFunctionSubclass():
        yield


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same, also of dtypes that torch does not compare."""
    with plain_tensors():
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
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


def describe(module: nn.Module, ours: Callable[[Any], bool] = lambda value: False, compiled: Any = None) -> Described:
    """Describe a module.

    `ours` says which attributes are left out; `compiled` is what the module was compiled to, where it lacks that.
    Raises UnknownValueError, saying what and where, for a module that another process could not make again as it is:
    hooked, offloaded, or with attributes that cannot be pickled.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, module, ours, compiled)
    try:
        pickler.dump(module)
    except UnknownValueError as error:
        if str(error).startswith(type(module).__name__):
            raise
        raise type(error)(f"{_find_culprit(module, ours)}: {error}") from error
    except Exception as error:  # whatever objects raise that cannot be pickled
        raise UnknownValueError(f"{_find_culprit(module, ours)} cannot be handed to workers: {error}") from error
    return Described(file.getvalue(), pickler.tensors, pickler.is_weight, pickler.containers)


def _find_culprit(root: nn.Module, ours: Callable[[Any], bool]) -> str:
    """Return the path of the first attribute of a module that cannot be pickled, the module's own name if none is."""
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
        self._ours = ours
        name = type(root).__name__
        self._paths = {id(module): f"{name}.{path}" if path else name for path, module in root.named_modules()}
        self._weights = {id(parameter) for parameter in root.parameters()}
        self._places: dict[int, int] = {}
        self._kinds: set[type] = set()

    def persistent_id(self, value: Any) -> Any:
        """Return what stands for a tensor or a device; note containers, which may be changed later."""
        kind = type(value)
        if kind in (dict, list, OrderedDict):
            self.containers.append(value)
        elif kind is torch.device:
            # A GPU has other numbers in other processes, and a worker has one.
            return "device", value.type if value.type == "cuda" else str(value)
        elif isinstance(value, Tensor) and not hasattr(value, "__tensor_flatten__"):  # which consists of others
            return self._tensor(value)
        return None

    def reducer_override(self, value: Any) -> Any:
        """Return how to pickle what pickle itself would not, or not rightly; see that the rest can be unpickled."""
        kind = type(value)
        if isinstance(value, NAMED):
            if value not in SINGLETONS:
                name_of(value)  # It raises for what a worker cannot import.
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
            if id(value) in self._weights:  # What it is made of, as quantized weights are, are weights too.
                self._weights |= {id(inner) for inner in vars(value).values() if isinstance(inner, Tensor)}
        elif hasattr(value, "__dict__"):
            self.containers.append(vars(value))
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
        # torch chooses some kernels by whether a weight requires a gradient, even where none is recorded.
        return "tensor", place, tensor.requires_grad, type(tensor), None

    def _check_device(self, tensor: Tensor) -> None:
        if tensor.device.type not in ("cpu", "cuda") or tensor.layout != torch.strided:
            raise UnknownValueError(
                f"a weight is on {tensor.device} ({tensor.layout}); workers take dense tensors on cores and GPUs"
            )

    def _check_class(self, kind: type) -> None:
        """See that a class is as its module has defined it, and note its methods to see later changes."""
        if kind in self._kinds:
            return
        self._kinds.add(kind)
        if (method := patched_method(kind)) is not None:
            raise PatchedClassError(
                f"{method} was exchanged in the class after its module was imported, and workers import the "
                "class without that; undo it, or make a subclass in a module of its own"
            )
        self.containers += methods_of(kind)

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
                        f"{path}.forward was exchanged on the object, by a hook or by hand; undo that"
                    )
            elif name not in LEFT_OUT and not self._ours(value):
                state[name] = value
        compiled = options_of(state.pop(COMPILED, None) or (self._compiled if module is self._root else None), path)
        # Not as a dict and a list, which would be containers of the module's, to be looked at for changes.
        return _blank, (type(module),), (tuple(state.items()), tuple(casts), compiled), None, None, _fill


def _bind(function: Any, owner: Any) -> types.MethodType:
    """Return a method whose function is not its class's. It may be a `functools.partial`, as torchao's are."""
    return types.MethodType(function, owner)


def _blank(kind: type[nn.Module]) -> nn.Module:
    """Return a module of a class, without calling the class's own initialization."""
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    return made


def _fill(module: nn.Module, packed: tuple[tuple[tuple[str, Any], ...], Any, dict[str, Any] | None]) -> None:
    """Give a module its attributes, casts and compilation."""
    state, casts, compiled = packed
    vars(module).update(state)
    for storage, compute in casts:
        add_cast(module, getattr(torch, storage), getattr(torch, compute))
    if compiled is not None:
        compile_in_worker(module, compiled)


def make(pickled: bytes, tensors: Sequence[Tensor]) -> nn.Module:
    """Return the module that `describe` described, with these tensors in it. The pickle must be trusted."""
    module = _Unpickler(io.BytesIO(pickled), tensors).load()
    assert isinstance(module, nn.Module)
    return module


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._made: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Any:
        """Return a device of this process, or a tensor, the same object for the same place."""
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
