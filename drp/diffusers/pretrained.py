"""Modules that workers on other machines load themselves, from where the pipeline was loaded.

A worker is sent the arguments of a component's `from_pretrained`, or the name of a factory that returns the pipeline,
and digests of the structure and the weights of the leader's module. It refuses a module of its own with other digests.
All of it is JSON: no pickle leaves the machine.
"""

from __future__ import annotations

import hashlib
import os
import pkgutil
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from drp.diffusers.compiled import COMPILED, OriginalForward
from drp.diffusers.contents import HOOKS
from drp.diffusers.features import LEFT_OUT
from drp.diffusers.publish import fingerprint
from drp.diffusers.pytree import PLAIN, Json, UnknownValueError, flatten, name_of, rebuild
from drp.diffusers.structure import PARTS, Described
from drp.workers.weights import Weights

NAME = "pretrained_model_name_or_path"
ORIGIN = ("_name_or_path", "_use_default_values")
"""Entries of a configuration that describe how the module was loaded."""
REMEDY = (
    "change it before: name, as pretrained='package.module:factory', a function that loads the pipeline and changes "
    "it, and that each machine can import"
)


def loading_of(pipe: Any, pretrained: str | Mapping[str, Any] | None) -> Json:
    """Return how workers on other machines load a pipeline's modules, given `parallelize`'s argument `pretrained`.

    Raises ValueError for arguments that cannot be sent, or if the pipeline does not know from where it was loaded.
    """
    if isinstance(pretrained, str) and ":" in pretrained:
        try:
            pkgutil.resolve_name(pretrained)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"pretrained is {pretrained!r}, which cannot be imported: {error}") from None
        return {"factory": pretrained}
    arguments: dict[str, Any] = {NAME: pretrained} if isinstance(pretrained, str) else dict(pretrained or {})
    arguments.setdefault(NAME, getattr(getattr(pipe, "config", None), "_name_or_path", None))
    if not arguments[NAME]:
        raise ValueError(
            f"{type(pipe).__name__} does not say what it was loaded from, and workers on other machines load it "
            "themselves; give pretrained=: its name or path, arguments of from_pretrained, or 'package.module:factory'"
        )
    arguments = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in arguments.items()}
    try:
        described, tensors, _ = flatten(arguments, "pretrained")
    except UnknownValueError as error:
        raise ValueError(str(error)) from None
    if tensors:
        raise ValueError("pretrained holds tensors; give the arguments of from_pretrained")
    return {"arguments": described}


class Pretrained:
    """The sources of a pipeline's modules for workers on other machines, which load them themselves."""

    def __init__(self, pipe: Any, pretrained: str | Mapping[str, Any] | None) -> None:
        self._loading = loading_of(pipe, pretrained)
        self._latest: dict[str, tuple[Described, list[tuple[int, ...]], Json]] = {}

    def publish(self, name: str, forward: OriginalForward, described: Described) -> Json:
        """Return the JSON by which a worker loads a module, the previous one if nothing has changed.

        Raises UnknownValueError for a module that cannot be compared, or is compiled.
        """
        if forward.compiled is not None:
            raise UnknownValueError(f"{name} is compiled, which workers on other machines do not do; leave that out")
        values = [fingerprint(tensor) for tensor in described.tensors]
        known, before, json = self._latest.get(name, (None, None, None))
        if known is not described or before != values:
            json = describe_module(name, forward.module, self._loading)
            self._latest[name] = described, values, json
        return json


def describe_module(name: str, module: nn.Module, loading: Json) -> Json:
    """Return the JSON by which a worker on another machine loads the component `name`, and compares it.

    Raises UnknownValueError for a module that cannot be compared.
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    try:
        digests = digests_of(module)
    except (RuntimeError, TypeError) as error:  # for tensors without plain storage, such as quantized ones
        raise UnknownValueError(f"{name} cannot be compared with another machine's: {error}") from error
    return {
        "component": name,
        "class": name_of(type(module)),
        "dtype": str(dtype).removeprefix("torch."),
        "loading": loading,
        **digests,
    }


def load(source: Json) -> nn.Module:
    """Load the module that `describe_module` described; raise ValueError if it differs from the leader's."""
    name, loading = source["component"], source["loading"]
    if "factory" in loading:
        module: nn.Module = getattr(pkgutil.resolve_name(loading["factory"])(), name)
        where = loading["factory"]
    else:
        arguments = rebuild(loading["arguments"], ())
        kind = pkgutil.resolve_name(source["class"])
        where = f"{arguments[NAME]} with revision {arguments.get('revision')}"
        module = kind.from_pretrained(**{"subfolder": name, "torch_dtype": getattr(torch, source["dtype"])} | arguments)
    found = digests_of(module)
    for what, due in found.items():
        if source[what] != due:
            raise ValueError(
                f"{name} as loaded here from {where} has other {what} than the leader's: the digests are {due} and "
                f"{source[what]}; give both machines the same files and versions. If the leader changed {name} after "
                f"loading it, {REMEDY}"
            )
    return module


def digests_of(module: nn.Module) -> dict[str, str]:
    """Return the digests of a module's structure and of its weights."""
    weights = Weights(module)
    walk = _Walk(module)
    text = "\n".join((weights.layout, *walk.lines()))
    return {"structure": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), "weights": weights.digest()}


class _Walk:
    """Describes a module's attributes, in lines of text that are the same in every process.

    Excluded are the origin of the module in its configuration, and attributes that do not affect its results. Hooks,
    of which the leader has none, and compilation are not compared. `Weights` describes parameters and buffers.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._paths = {id(module): path for path, module in root.named_modules()}
        self._seen: set[int] = set()

    def lines(self) -> list[str]:
        lines = []
        skipped = {*PARTS, *HOOKS, *LEFT_OUT, COMPILED, "forward"}
        for path, module in self._root.named_modules():
            lines.append(f"{path} {name_of(type(module))}")
            lines += [f"{path}.{k} {self._text(v)}" for k, v in sorted(vars(module).items()) if k not in skipped]
            lines += [f"{path}.{k} {p.requires_grad}" for k, p in module._parameters.items() if p is not None]
            lines += [f"{path}.{k} {self._text(child)}" for k, child in module._modules.items()]
        return lines

    def _text(self, value: Any) -> str:
        kind = type(value)
        if kind in (*PLAIN, complex, bytes, torch.dtype, torch.device, torch.Size):
            return repr(value)
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            return (
                f"{value.dtype} {tuple(value.shape)} {hashlib.blake2b(flat.numpy().data, digest_size=16).hexdigest()}"
            )
        if id(value) in self._paths:
            return f"module {self._paths[id(value)]!r}"
        if isinstance(value, type) or hasattr(value, "__qualname__"):  # classes, functions and methods
            return name_of(getattr(value, "__func__", value))
        if isinstance(value, Mapping):
            items = [f"{k!r}: {self._text(v)}" for k, v in value.items() if k not in ORIGIN]
            return f"{kind.__name__} {sorted(items)}"
        if isinstance(value, list | tuple | set | frozenset):
            texts = [self._text(each) for each in value]
            return f"{kind.__name__} {sorted(texts) if isinstance(value, set | frozenset) else texts}"
        if id(value) in self._seen:
            return f"{name_of(kind)} again"
        self._seen.add(id(value))
        if not hasattr(value, "__dict__"):
            raise UnknownValueError(f"a {kind.__name__} cannot be compared with another machine's")
        return f"{name_of(kind)} {self._text(vars(value))}"
