"""Conversion of a Submit message to the leader's options, and of a result to a message."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from drp.leader.request import RequestArguments
from drp.protocol.arrays import take_array
from drp.protocol.client_messages import (
    MAX_FRAME_NBYTES,
    MAX_INCIDENT_LENGTH,
    MAX_INCIDENTS,
    Finished,
    Option,
    Residual,
    Rule,
    Submit,
    TensorData,
)
from drp.protocol.frames import Frame, FrameReader, nbytes_of_samples, shape_of_samples
from drp.protocol.memory import SharedMemory
from drp.protocol.messages import ModelSpec
from drp.sampling.drafts import DraftRule
from drp.sampling.result import Result
from drp.sampling.run import Callback


def options(submit: Submit, frames: Sequence[Frame], callback: Callback) -> RequestArguments:
    """Return the leader's options for a Submit; raise ProtocolError if the tensors do not match the message."""
    received = FrameReader(frames)
    cond = {each.name: take_array(received, each.tensor, "torch") for each in submit.cond}
    noise, image = (
        None if each is None else take_array(received, each, "torch") for each in (submit.noise, submit.image)
    )
    received.done()
    rule = submit.rule
    given = {
        name: getattr(submit, name) for name in RequestArguments.__annotations__ if name not in ("callback", "out")
    }
    given |= {
        "cond": cond,
        "noise": noise,
        "image": image,
        "solver_options": _named("solver_options", submit.solver_options),
        "grid": _named("grid", submit.grid),
        "rule": DraftRule(rule.carry, rule.slope, rule.axis) if isinstance(rule, Rule) else rule,
        "tolerance": math.inf if submit.tolerance is None else submit.tolerance,
        "callback": callback,
    }
    return cast(RequestArguments, given)


def check_samples(submit: Submit, spec: ModelSpec, local: bool) -> None:
    """Raise ValueError for samples that cannot be sent in a message. `local` means that the client is on this host."""
    if submit.memory and not local:
        raise ValueError("memory is true, which an ipc:// address alone allows")
    nbytes = nbytes_of_samples(submit, spec)
    if nbytes == 0:
        raise ValueError(f"samples of shape {list(shape_of_samples(submit, spec))} are empty; give sizes from 1")
    if nbytes > MAX_FRAME_NBYTES:
        raise ValueError(f"samples of {nbytes} bytes; at most {MAX_FRAME_NBYTES}: ask for fewer")


def allocate_samples(shape: tuple[int, ...]) -> tuple[SharedMemory, Tensor]:
    """Allocate shared memory for samples; return it with a float32 tensor in it."""
    memory = SharedMemory.create(math.prod(shape) * torch.float32.itemsize)
    try:
        return memory, memory.tensor(0, shape, torch.float32)
    except BaseException:
        memory.close()
        raise


def _named(what: str, given: Sequence[Option]) -> dict[str, Any]:
    named = {option.name: option.value for option in given}
    if len(named) < len(given):
        raise ValueError(f"{what} names an option twice: {[option.name for option in given]!s:.200}")
    return named


def finished(request: int, result: Result, samples: TensorData, waited: float) -> Finished:
    """Return the message for a result."""
    return Finished(
        request=request,
        samples=samples,
        mode=result.mode[:200],
        drafts=result.drafts,
        steps=result.steps,
        devices=result.devices,
        rounds=result.rounds,
        evaluations=result.evaluations,
        seconds=result.seconds,
        device_seconds=result.device_seconds,
        waited=waited,
        residuals=tuple(Residual(k, r if math.isfinite(r) else None) for k, r in sorted(result.residuals.items())),
        cuts=result.cuts,
        evaluated=result.evaluated,
        incidents=_incident_texts(result.incidents),
    )


def _incident_texts(incidents: Sequence[str]) -> tuple[str, ...]:
    """Truncate incidents to what a message holds; the last entry gives the number of omitted ones."""
    first = incidents if len(incidents) <= MAX_INCIDENTS else incidents[: MAX_INCIDENTS - 1]
    texts = [incident[:MAX_INCIDENT_LENGTH] for incident in first]
    if len(incidents) > len(first):
        texts.append(f"and {len(incidents) - len(first)} more")
    return tuple(texts)


def error_text(error: BaseException, max_length: int) -> str:
    """Return an error's text in valid Unicode, truncated to `max_length` characters."""
    return (str(error) or repr(error)).encode(errors="backslashreplace").decode()[:max_length]
