"""Runs any of ComfyUI's sampler functions with a model whose outputs are predicted at drafts.

A sampler function is `function(model, x, sigmas, extra_args=..., callback=..., disable=..., **options)`. It calls
`model(x, sigma, **extra_args)`, which returns the denoised latents after guidance, once or several times a step.

The function itself does the refining, so that its callbacks come in order and one draft a round has its own bits. To
make drafts, the function is run once more from the start, with the answers that are known for the calls so far and
the estimates of a draft rule (docs/drafts.md) for those that follow. The inputs of those calls are the drafts. No
network is evaluated in that, and drafts have the noise and the history of the sampler, whatever sampler it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from drp.sampling.drafts import Levels
from drp.sampling.modes import Mode, Round
from drp.sampling.predictions import estimates

log = logging.getLogger(__name__)

Function = Callable[..., Tensor]
Evaluate = Callable[[Sequence[Tensor], Sequence[Tensor], Mapping[str, Any]], Sequence[Tensor]]
"""(inputs [B, ...], their sigmas [B], the model's further arguments) -> what the model returns for each."""

MAX_CALLS = 10_000
"""A sampler that calls its model more often than this in a dry run is taken for one that does not end."""


class _DryRunEndedError(Exception):
    """Ends a dry run once the drafts are known."""


class _ModelProxy:
    """What a sampler function takes for the model: `answer` is called in its place, attributes are the model's."""

    def __init__(self, model: Any, answer: Callable[..., Tensor]) -> None:
        self._model, self._answer = model, answer

    def __call__(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        return self._answer(x, sigma, **extra)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class DraftedRun:
    """One run of a sampler function over `sigmas` [N + 1] from the latents x [B, ...].

    function, options: the sampler function and its own arguments.
    evaluate: evaluates the model at several inputs, on one device or several.
    check: is called before every round; it may raise to end the run, as ComfyUI does on an interrupt.
    prediction_type: what the network predicts; it says what a prediction at a draft becomes at the refined latents.
    flow: whether latents are (1 - sigma) data + sigma noise, and not data + sigma noise.
    """

    def __init__(
        self,
        function: Function,
        mode: Mode,
        evaluate: Evaluate,
        model: Any,
        prediction_type: str,
        flow: bool,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._function, self._mode, self._evaluate, self._model = function, mode, evaluate, model
        self._type, self._flow, self._check = prediction_type, flow, check
        self.calls = self.rounds = 0
        self.reason = ""
        """Why calls are evaluated one by one; nothing as long as they are drafted."""
        self._taken: list[Tensor] = []
        self._predicted: dict[int, tuple[Tensor, Tensor]] = {}
        """By the number of a call: the draft, and the denoised latents that the model returned for it."""
        self._base = self._previous_base = 0

    def sample(
        self,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        disable: bool | None = None,
        **options: Any,
    ) -> Tensor:
        """Run the sampler function and return its result."""
        self._extra, self._options = dict(extra_args or {}), options
        self._start, self._sigmas = x.clone(), sigmas.clone()
        self._random = _random_state(x.device)
        self._plan = self._dry_run_all()
        self._levels = self._make_levels()
        self._schedule = self._mode.rounds(len(self._plan))
        self._next: Round | None = next(self._schedule, None)
        extra = dict(self._extra)
        return self._function(
            _ModelProxy(self._model, self._answer),
            x,
            sigmas,
            extra_args=extra,
            callback=callback,
            disable=disable,
            **options,
        )

    # The sampler's own run.

    def _answer(self, x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        """Return the denoised latents for the sampler's next call: as predicted, or evaluated now."""
        k, self.calls = self.calls, self.calls + 1
        if not self.reason:
            self.reason = self._why_not(k, sigma, extra)
        if not self.reason and self._due(k):
            try:
                drafts = self._drafts(k, x)
            except Exception as error:  # the sampler itself goes on
                log.warning("drp: drafting failed; the sampler goes on without", exc_info=error)
                self.reason = f"drafting failed: {type(error).__name__}: {error}"
            else:
                self._predict(k, drafts, sigma, extra)
        if self.reason:
            self._check()
            self.rounds += 1
            self._taken.clear()
            self._predicted.clear()
            (denoised,) = self._evaluate([x], [sigma], extra)
            return denoised
        draft, denoised = self._predicted.pop(k)
        denoised = self._carried(k, draft, denoised, x)
        self._taken.append(denoised)
        return denoised.clone()  # The sampler may write to it.

    def _why_not(self, k: int, sigma: Tensor, extra: Mapping[str, Any]) -> str:
        if k >= len(self._plan) or not math.isclose(float(sigma[0]), self._plan[k], rel_tol=1e-5, abs_tol=1e-8):
            return "the sampler chooses its noise levels by what the model returns"
        if any(value is not self._extra.get(name) for name, value in extra.items()):
            return "the sampler changes the model's options"
        return ""

    def _due(self, k: int) -> bool:
        return k not in self._predicted or (self._next is not None and self._next.predict[0] == k)

    def _predict(self, k: int, drafts: Sequence[Tensor], sigma: Tensor, extra: Mapping[str, Any]) -> None:
        """Evaluate the model at the inputs of the calls from k on."""
        self._check()
        self.rounds += 1
        levels = [sigma, *(torch.full_like(sigma, self._plan[i]) for i in range(k + 1, k + len(drafts)))]
        results = self._evaluate(drafts, levels, extra)
        self._predicted = {k + j: pair for j, pair in enumerate(zip(drafts, results, strict=True))}
        self._next = next(self._schedule, None)

    def _carried(self, k: int, draft: Tensor, denoised: Tensor, x: Tensor) -> Tensor:
        """Return the denoised latents at x, given those predicted at a draft, by the rule's carry."""
        carry = self._mode.rule.carry_at(k, self._levels)
        if draft is x or carry == 1 or torch.equal(draft, x):
            return denoised
        alpha = self._levels.alphas[k]
        at_state = estimates(self._type, alpha, self._levels.sigmas[k]).data_x * (1 if self._flow else alpha)
        shift = (1 - carry) * at_state * (x - draft)
        mask = self._extra.get("denoise_mask")
        return denoised + (shift if mask is None else shift * mask)

    # Drafts.

    def _drafts(self, k: int, x: Tensor) -> list[Tensor]:
        """Return the inputs of the calls that the next round predicts: x of call k, and drafts for those after it."""
        r = self._next
        assert r is not None
        assert r.predict == tuple(range(k, r.predict[-1] + 1)), "the node offers only modes that go on call by call"
        if r.base > self._base:
            self._previous_base, self._base = self._base, r.base
        last = r.predict[-1]
        if last == k:
            return [x]
        inputs: list[Tensor] = []
        newest, data = k - 1, self._taken[k - 1]

        def answer(number: int, state: Tensor) -> Tensor:
            nonlocal newest, data
            if number < k:
                return self._taken[number].clone()
            inputs.append(state.clone())
            if number == last:
                raise _DryRunEndedError
            if number in self._predicted:
                newest, data = number, self._carried(number, *self._predicted[number], state)
                return data.clone()
            return self._extrapolated(number, newest, data)

        self._dry_run(answer)
        if len(inputs) != len(r.predict) or not torch.equal(inputs[0], x):
            raise RuntimeError("run a second time, the sampler does not do the same")
        return inputs

    def _extrapolated(self, k: int, newest: int, data: Tensor) -> Tensor:
        """Return the denoised latents that the rule assumes for call k."""
        base = self._previous_base if self._previous_base <= newest else newest
        weights = self._mode.rule.extrapolate(k, base, newest, self._levels)
        total = torch.zeros_like(data)
        for number, weight in weights.items():
            total = total + weight * (data if number == newest else self._taken[number])
        return total

    # Dry runs.

    def _dry_run(self, answer: Callable[[int, Tensor], Tensor]) -> list[float]:
        """Run the sampler function without the model; return the noise level of each call."""
        levels: list[float] = []

        def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            levels.append(float(sigma[0]))
            if len(levels) > MAX_CALLS:
                raise RuntimeError("the sampler does not end")
            return answer(len(levels) - 1, x)

        with suppress(_DryRunEndedError), _random_numbers(self._start.device, self._random):
            self._function(
                _ModelProxy(self._model, model),
                self._start.clone(),
                self._sigmas.clone(),
                extra_args=dict(self._extra),
                callback=None,
                disable=True,
                **self._options,
            )
        return levels

    def _dry_run_all(self) -> list[float]:
        """Return the noise levels of all calls."""
        try:
            return self._dry_run(lambda number, x: torch.zeros_like(x))
        except Exception as error:  # the sampler itself may do all the same
            log.debug("the sampler has no dry run", exc_info=error)
            self.reason = f"the sampler cannot be run without its model: {type(error).__name__}: {error}"
            return []

    def _make_levels(self) -> Levels:
        sigmas = self._plan
        if self._flow:
            alphas = [1 - s for s in sigmas]
        else:
            alphas = [1 / math.sqrt(s * s + 1) for s in sigmas]
            sigmas = [s * a for s, a in zip(sigmas, alphas, strict=True)]
        return Levels(tuple(alphas), tuple(sigmas), tuple(self._plan), self._type)


def _random_state(device: torch.device) -> list[Tensor]:
    """Return the states of torch's common random generators that a sampler on this device may draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(device: torch.device, states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def _random_numbers(device: torch.device, states: Sequence[Tensor]) -> Iterator[None]:
    """Draw random numbers from these states, and leave the generators as they were."""
    before = _random_state(device)
    _set_random_state(device, states)
    try:
        yield
    finally:
        _set_random_state(device, before)
