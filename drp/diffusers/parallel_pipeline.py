"""The context in which the calls of a pipeline's denoiser are answered from drafts."""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from drp.diffusers.call import PipelineCall
from drp.diffusers.compiled import COMPILED, OriginalForward
from drp.diffusers.context import PipelineContext
from drp.diffusers.evaluators import Evaluator
from drp.diffusers.hook import Hook
from drp.diffusers.offload import ModelOffload
from drp.diffusers.pipeline_modes import Modes
from drp.diffusers.pretrained import Pretrained
from drp.diffusers.publish import Publisher
from drp.diffusers.pytree import Json
from drp.diffusers.report import CallReport, Report
from drp.diffusers.structure import Described, describe, has_own_forward
from drp.diffusers.watch import WatchedMethod, schedulers_by_name, schedulers_of


class Parallel:
    """A parallelised pipeline. `report` has a report of each of its calls.

    Its state is held by:

        the denoising modules   `originals`, `_modules`, `_hooks`, `_described`, `offload`
        the schedulers          `_schedulers`, `_watched` (also those replaced since), `_methods`
        the workers             `_evaluator`; `_publisher` and `_pretrained`, by which they get the modules
        the call under way      `_call`, `_fresh` (the next one begins), `_latest`, `_thread`, `_overtaken`
    """

    def __init__(self, pipe: Any, modes: Modes, names: Sequence[str], split: bool, always_draft: bool) -> None:
        self.report = Report()
        self._pipe, self._modes, self._split, self._always_draft = pipe, modes, split, always_draft
        self.originals = {name: OriginalForward(getattr(pipe, name)) for name in names}
        """The modules as the pipeline calls them without drp, including replaced ones."""
        self._modules = {name: original.module for name, original in self.originals.items()}
        self.offload = ModelOffload(pipe, names)
        self._schedulers: dict[str, Any] = {}
        self._watched: list[Any] = []
        self._methods: list[WatchedMethod] = []
        self._hooks: dict[str, Hook] = {}
        self._call: PipelineCall | None = None
        self._latest: Any = None
        self._fresh = True
        self._thread: int | None = None
        self._lock = threading.RLock()
        self._overtaken: set[int] = set()
        self._described: dict[str, Described] = {}
        self._publisher: Publisher | None = None
        self._pretrained: Pretrained | None = None
        self._evaluator: Evaluator | None = None

    def enter(self, evaluator: Evaluator, publisher: Publisher | None, pretrained: Pretrained | None = None) -> None:
        """Begin answering the denoiser's calls."""
        if any("forward" in vars(module) and not has_own_forward(module) for module in self._modules.values()):
            raise ValueError(
                f"{type(self._pipe).__name__} is parallelised already, or a hook took its denoiser's forward; "
                "leave that first"
            )
        self._evaluator, self._publisher, self._pretrained = evaluator, publisher, pretrained
        for name in self._modules:
            self._hook(name)
        self._watch()

    def leave(self) -> None:
        for name in self._hooks:
            self._unhook(name)
        for method in reversed(self._methods):
            method.undo()
        self._methods.clear()
        self._watched.clear()
        self._schedulers.clear()
        if self._call is not None:
            self._call.close()
        self._call, self._fresh = None, True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Restore the pipeline during a block, to call it without drafts."""
        evaluator = self._evaluator
        assert evaluator is not None
        self.leave()
        try:
            yield
        finally:
            self.enter(evaluator, self._publisher, self._pretrained)

    def _hook(self, name: str) -> None:
        module = self._modules[name]
        hook = Hook(functools.partial(self._evaluate, name), types.MethodType(type(module).forward, module))
        vars(module).pop(COMPILED, None)
        if getattr(self._pipe, name) is self.originals[name].compiled:
            setattr(self._pipe, name, module)
        self._hooks[name] = module.forward = hook

    def _unhook(self, name: str) -> None:
        module, hook = self._modules[name], self._hooks[name]
        hook.over = True  # A wrapper that was added in the meantime still calls it.
        if vars(module).get("forward") is hook:
            del module.forward
        compiled = self.originals[name].compiled
        if not isinstance(compiled, nn.Module):
            vars(module).update({COMPILED: compiled} if compiled is not None else {})
        elif getattr(self._pipe, name) is module:
            setattr(self._pipe, name, compiled)

    def _follow_replacements(self) -> None:
        """Replace `forward` in the modules that the pipeline has now, if some were replaced or compiled."""
        for name, known in self._modules.items():
            module = getattr(self._pipe, name, None)
            if not isinstance(module, nn.Module) or (module is known and COMPILED not in vars(known)):
                continue
            original = OriginalForward(module)
            if original.module is not known and not has_own_forward(original.module):
                continue
            if original.module is not known:
                self._unhook(name)
            self.originals[name], self._modules[name] = original, original.module
            self._described.pop(name, None)
            self._hook(name)

    def _watch(self) -> None:
        """Watch the pipeline's schedulers, including replaced ones."""
        if self._schedulers and all(getattr(self._pipe, n, None) is known for n, known in self._schedulers.items()):
            return
        self._schedulers = schedulers_by_name(self._pipe)
        for scheduler in self._schedulers.values():
            if not any(scheduler is watched for watched in self._watched):
                self._watched.append(scheduler)
                self._fresh = True
                for name, notify in (("step", self._step), ("set_timesteps", self._set_timesteps)):
                    notified = functools.partial(notify, scheduler)
                    self._methods.append(WatchedMethod(scheduler, name, notified))

    def _step(
        self, scheduler: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        with self._lock:
            if self._call is not None and not self._fresh and self._call.belongs(scheduler):
                self._check_thread()
                try:
                    return self._call.step(original, args, kwargs)
                finally:
                    self._follow_replacements()
        return original(*args, **kwargs)

    def _set_timesteps(
        self, scheduler: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        with self._lock:
            here = threading.get_ident()
            if self._thread not in (None, here) and self._call is not None and self._call.goes_on:
                self._overtaken.add(self._thread)
            self._overtaken.discard(here)
            self._thread, self._latest, self._fresh = here, scheduler, True
            self._follow_replacements()
            return original(*args, **kwargs)

    def _check_thread(self) -> None:
        """Raise RuntimeError if another thread has begun a call during this thread's."""
        if threading.get_ident() in self._overtaken:
            raise RuntimeError(
                f"{type(self._pipe).__name__} was called from another thread before this call has ended; its scheduler "
                "holds the state of one call. Let calls follow one another, or give each thread a pipeline of its own "
                "(they may share Workers)"
            )

    def _evaluate(self, name: str, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            self._check_thread()
            self._watch()
            if self._fresh:
                self.offload.offload_previous_models()
                self._begin()
            assert self._call is not None
            return self._call.evaluate(name, args, kwargs)

    def _begin(self) -> None:
        assert self._evaluator is not None
        if self._call is not None:
            self._call.close()
        self._fresh = False
        report = CallReport(self._modes[False].name, self._modes[False].width, self._evaluator.devices)
        self.report.calls.append(report)
        work = PipelineContext(
            self._pipe,
            self._modes,
            self.originals,
            self._evaluator,
            self._split,
            self._always_draft,
            self._describe,
            self.publish,
            self._unchanged,
            self._config,
        )
        scheduler = next((s for s in schedulers_of(self._pipe) if s is self._latest), next(schedulers_of(self._pipe)))
        self._call = PipelineCall(work, scheduler, report)

    def publish(self, name: str, described: Described) -> Json:
        """Publish a module for the workers, and return its source."""
        json = None if self._publisher is None else self._publisher.publish(name, described)
        if self._pretrained is not None:
            json = {**(json or {}), "pretrained": self._pretrained.publish(name, self.originals[name], described)}
        return json

    def _describe(self, name: str) -> Described:
        """Describe a module; return the previous description if nothing has changed."""
        if name not in self._described or not self._unchanged(name):
            self._described[name] = self.describe(name)
        return self._described[name]

    def describe(self, name: str) -> Described:
        """Describe a module; raise UnknownValueError, a ValueError, if it cannot be described."""
        return describe(self._modules[name], lambda value: isinstance(value, Hook), self.originals[name].compiled)

    def _unchanged(self, name: str) -> bool:
        """Return whether a module is unchanged since its last description."""
        described = self._described.get(name)
        return described is not None and described.follow(lambda: self.describe(name))

    def _config(self, name: str) -> Mapping[str, Any]:
        return getattr(self._modules[name], "config", {})
