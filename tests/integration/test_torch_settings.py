"""The torch settings of the calling program do not reach a run; the reference computes with those of a worker."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

import drp
from drp import ExecutionOptions, Leader
from drp.torch_defaults import SETTINGS
from tests.conftest import dispatching

RUN: dict[str, Any] = {"labels": [3], "steps": 4, "mode": "aggressive"}


@contextmanager
def changed(read: Callable[[], Any], write: Callable[[Any], object], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def mkldnn_enabled() -> bool:
    return bool(torch.backends.mkldnn.enabled)


def set_mkldnn(enabled: bool) -> None:
    torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]  # a property of the module


def matmul_precision() -> str:
    return str(getattr(torch.backends.cuda.matmul, "fp32_precision", "none"))


def set_matmul_precision(value: str) -> None:
    if hasattr(torch.backends, "fp32_precision"):  # since torch 2.9
        torch.backends.cuda.matmul.fp32_precision = value


def half_precision() -> Any:
    matmul = torch.backends.cuda.matmul
    name = "allow_fp16_reduced_precision_reduction"
    return getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)  # since torch 2.10


def set_half_precision(values: Any) -> None:
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = values[0] if values[1] is None else values


CHANGES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "bfloat16": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "threads": lambda: changed(torch.get_num_threads, torch.set_num_threads, 2),
    "inference mode": torch.inference_mode,
    "no mkldnn": lambda: changed(mkldnn_enabled, set_mkldnn, False),
    "medium precision": lambda: changed(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "TF32 by an attribute": lambda: changed(matmul_precision, set_matmul_precision, "tf32"),
    "no split-k": lambda: changed(half_precision, set_half_precision, (False, half_precision()[1] and False)),
    "deterministic": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
}


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return drp.reference("digits", devices=2, **RUN).samples


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_of_the_program_changes_no_bit(change: str, digits: Leader, expected: torch.Tensor) -> None:
    with CHANGES[change]():
        before = [read() for read, _, _ in SETTINGS]
        samples = [digits.sample(**RUN).samples, drp.reference("digits", devices=2, **RUN).samples]
        assert [read() for read, _, _ in SETTINGS] == before
    for each in samples:
        assert each.dtype == torch.float32
        assert torch.equal(each, expected)


@pytest.mark.parametrize("change", sorted(CHANGES.keys() - {"device", "threads", "inference mode"}))
def test_a_setting_reaches_workers_of_pipelines(change: str) -> None:
    settings = pytest.importorskip("drp.diffusers.settings")
    with CHANGES[change]():
        expected = [read() for read, _, _ in SETTINGS]
        sent = json.loads(json.dumps(settings.read_settings()))
    before = [read() for read, _, _ in SETTINGS]
    assert before != expected
    with settings.applied(sent):
        assert [read() for read, _, _ in SETTINGS] == expected
    assert [read() for read, _, _ in SETTINGS] == before


def test_a_leader_that_starts_under_other_defaults_computes_the_same(expected: torch.Tensor) -> None:
    with CHANGES["float64"](), CHANGES["device"](), Leader("digits", devices=1) as own:
        samples = [own.sample(**RUN, drafts=2).samples]
        with dispatching(own, "sync"):
            samples.append(own.sample(**RUN, drafts=2).samples)
    for each in samples:
        assert torch.equal(each, expected)


def test_autocast_is_refused_with_the_remedy(digits: Leader) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"torch.autocast\('cpu'\) is on .* put it into the denoiser's own code"):
            digits.submit(**RUN)
        with pytest.raises(ValueError, match=r"torch.autocast\('cpu'\) is on"):
            drp.reference("digits", **RUN)


def test_asynchronous_ordering_is_refused_where_stores_may_be_reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(ValueError, match=r"dispatch is 'async', but the processor is aarch64.*give 'auto' or 'sync'"):
        ExecutionOptions(dispatch="async")
    assert not ExecutionOptions().allows_async
