"""The registry of models: a name is that of a built-in model, or `package.module:factory` for a user's model."""

from __future__ import annotations

import contextlib
import functools
import logging
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from drp.models.state import ModuleState, others_draw, random_states
from drp.protocol.messages import ModelSpec

log = logging.getLogger(__name__)

T = TypeVar("T")
Predict = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]

BUILT_IN = {
    "digits": ("drp.models.digits:load", ModelSpec(sample_shape=(1, 28, 28), classes=10, guidance=2.0)),
}


FACTORY_SEED = 0
NEEDS_AUTOGRAD = ("nference tensor", "does not require grad")
"""Parts of the messages of torch's RuntimeError when a denoiser computes gradients in inference mode."""


@dataclass(frozen=True)
class Denoiser:
    """A loaded model. `predict(x, t, cond)` maps x [B, ...], t float32 [B] and tensors by name to a tensor like x.

    Calling the Denoiser instead of `predict` makes the result a function of the arguments only: the model receives
    copies of them, to which it may write, and `state` restores the buffers of its module afterwards.
    """

    predict: Predict
    spec: ModelSpec
    state: ModuleState = field(default_factory=ModuleState)

    def __call__(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Return the prediction in the dtype of x; raise TypeError if the model's result does not have the shape of x.

        The model runs in inference mode, or, if it computes gradients itself, under torch.no_grad().
        """
        return self._run(lambda: self._predict(x.clone(), t.clone(), cond))

    def evaluate(
        self, inputs: Mapping[str, Tensor], timestep: float, cond: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> float:
        """Evaluate a draft, `inputs`, and copy the prediction to `outputs`.

        Inputs and outputs are the tensor `x`, unless the model has a method `fill(inputs, timestep, cond, outputs)`,
        which writes to the outputs itself, may use any tensors, and must not write to the inputs.

        Returns:
            The time, in seconds of perf_counter, at which the prediction was computed and the copy began.

        Raises TypeError if the model's result does not have the shape of the input.
        """
        fill = self._fill
        if fill is not None:
            self._run(lambda: fill(inputs, timestep, cond, outputs))
            return time.perf_counter()
        x = inputs["x"]
        predicted = self._run(lambda: self._predict(x.clone(), _timesteps(x, timestep), cond))
        made = time.perf_counter()
        outputs["x"].copy_(predicted)
        return made

    def evaluate_batch(
        self,
        inputs: Sequence[Mapping[str, Tensor]],
        timesteps: Sequence[float],
        cond: Mapping[str, Tensor],
        outputs: Sequence[Mapping[str, Tensor]],
    ) -> float:
        """Evaluate several drafts as one batch, concatenated along the first dimension; see `evaluate`.

        Conditions whose first dimension is the number of samples are repeated for each draft. A model with a method
        `fill` evaluates one draft after the other, unless it has a method `fill_batch(inputs, cond, outputs)`.
        """
        if len(inputs) > 1 and hasattr(self.predict, "fill_batch"):
            fill_batch: Any = self.predict.fill_batch
            self._run(lambda: fill_batch(inputs, cond, outputs))
            return time.perf_counter()
        if self._fill is not None or len(inputs) == 1:
            for each, timestep, output in zip(inputs, timesteps, outputs, strict=True):
                made = self.evaluate(each, timestep, cond, output)
            return made
        xs = [draft["x"] for draft in inputs]
        samples = xs[0].shape[:1]
        if not samples:
            raise TypeError("a state without a first size cannot be batched; leave drafts_per_device at 1")
        given = {
            name: torch.cat([value] * len(xs)) if value.shape[:1] == samples else value for name, value in cond.items()
        }
        predicted = self._run(
            lambda: self._predict(
                torch.cat(xs), torch.cat([_timesteps(xs[0], timestep) for timestep in timesteps]), given
            )
        )
        made = time.perf_counter()
        for output, one in zip(outputs, predicted.chunk(len(xs)), strict=True):
            output["x"].copy_(one)
        return made

    @functools.cached_property
    def _fill(self) -> Callable[..., object] | None:
        return getattr(self.predict, "fill", None)

    def _predict(self, x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Evaluate x and t, to which the model may write, and copies of the conditions."""
        own = {name: value.clone(memory_format=torch.contiguous_format) for name, value in cond.items()}
        shape, dtype, layout = x.shape, x.dtype, x.layout  # Before the model changes them, by x.squeeze_() for example.
        written = True
        try:
            predicted = self.predict(x, t, own)
            if (
                not isinstance(predicted, Tensor)
                or predicted.shape != shape
                or not predicted.is_floating_point()
                or predicted.layout != layout
            ):
                due = _described(dtype, layout, shape)
                raise TypeError(f"the denoiser returned {_kind(predicted)}; it must return {due}, like its input")
            written = self.state.is_written
            # If so, the result may be a view of a buffer that is about to be restored.
            return predicted if predicted.dtype == dtype and not written else predicted.to(dtype, copy=written)
        finally:
            if written:
                self.state.restore()

    def _run(self, evaluate: Callable[[], T]) -> T:
        if self.state.evaluations < 3:
            evaluate = functools.partial(self._without_random_numbers, evaluate)
        if not self.state.needs_autograd:
            try:
                if torch.is_inference_mode_enabled():  # As in a worker, where entering it once more is not free.
                    return evaluate()
                with torch.inference_mode():
                    return evaluate()
            except RuntimeError as error:
                if not any(sign in str(error) for sign in NEEDS_AUTOGRAD):
                    raise
                log.debug("the denoiser takes gradients, and is evaluated without inference mode: %s", error)
            self.state.needs_autograd = True
        with torch.inference_mode(mode=False), torch.no_grad():
            return evaluate()

    def _without_random_numbers(self, evaluate: Callable[[], T]) -> T:
        """Evaluate; raise RuntimeError if evaluations draw from global random number generators.

        The second and the third are looked at: a model that seeds them itself leaves them in the state in which its
        first evaluation has left them, and another thread of the program may draw once meanwhile. If numbers are also
        drawn while nothing is evaluated, it was another thread.
        """
        self.state.evaluations += 1
        # torch.cuda.is_initialized has no type annotations.
        gpus = [torch.device("cuda")] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        before = random_states(gpus)
        made = evaluate()
        if self.state.evaluations > 1:
            self.state.draws += random_states(gpus) != before
        if self.state.draws == 2 and not others_draw(gpus):
            raise RuntimeError(
                "the denoiser draws random numbers, so that its predictions would depend on which worker makes them, "
                "and in which order; leave that out, or draw from a torch.Generator that each evaluation seeds"
            )
        return made

    @property
    def module(self) -> nn.Module | None:
        """The module whose weights can be shared, None if the model is not a module."""
        return self.predict if isinstance(self.predict, nn.Module) else None


def describe(name: str) -> ModelSpec | None:
    """Return a built-in model's specification without loading it, None for others; raise ValueError for a bad name."""
    if name in BUILT_IN:
        return BUILT_IN[name][1]
    module, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *attribute.split("."))):
        known = ", ".join(BUILT_IN)
        raise ValueError(f"unknown model {name!r}; built in: {known}; your own are named 'package.module:factory'")
    return None


def load(name: str) -> Denoiser:
    """Load a model into this process, for inference.

    A factory takes no arguments and returns a module or any callable `(x, t, cond) -> prediction`, which may have an
    attribute `spec`, a `ModelSpec`. It is called with torch's random number generators in a fixed state, so that the
    weights it draws are the same in every process; the generators' own state is restored afterwards.
    """
    describe(name)
    factory = pkgutil.resolve_name(BUILT_IN[name][0] if name in BUILT_IN else name)
    # torch.cuda.is_initialized has no type annotations.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(FACTORY_SEED)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(FACTORY_SEED)
        predict = factory()
    if isinstance(predict, torch.export.ExportedProgram):
        predict = predict.module()
    if not callable(predict):
        raise TypeError(f"{name} returned {type(predict).__name__}; a factory returns a module or a callable")
    spec = getattr(predict, "spec", ModelSpec())
    if not isinstance(spec, ModelSpec):
        raise TypeError(f"{name}: its spec is a {type(spec).__name__}, not a drp.models.ModelSpec")
    if not isinstance(predict, nn.Module):
        return Denoiser(predict, spec)
    with contextlib.suppress(NotImplementedError):  # The mode of an exported program cannot be changed.
        predict.eval()
    for parameter in predict.parameters():  # A ScriptModule has no requires_grad_.
        parameter.requires_grad_(False)
    return Denoiser(predict, spec, ModuleState(predict))


def _timesteps(x: Tensor, timestep: float) -> Tensor:
    """Return the timestep of each sample of x, float32 [B], new memory."""
    return torch.full(x.shape[:1], timestep, dtype=torch.float32, device=x.device)


def _kind(value: object) -> str:
    """Describe the result of a denoiser."""
    return _described(value.dtype, value.layout, value.shape) if isinstance(value, Tensor) else type(value).__name__


def _described(dtype: torch.dtype, layout: torch.layout, shape: torch.Size) -> str:
    dense = "" if layout == torch.strided else f" {layout}"
    return f"{dtype}{dense} {list(shape)}"
