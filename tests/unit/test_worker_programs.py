"""The programs and modules that a worker of pipelines keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from drp.diffusers.program import PROGRAM
from drp.diffusers.worker import Programs
from drp.models.gpu import Graphs


def test_graphs_are_freed_with_the_modules_whose_buffers_they_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed evaluation modules are loaded anew, and a graph would read what has become other tensors'."""

    def capture(graphs: Graphs, function: Any, device: torch.device, restore: Any) -> tuple[Any, Any]:
        return (lambda: None), function()

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Graphs, "_capture", capture)
    programs, graphs = Programs(), Graphs()
    graphs(lambda given: given["x"], {"x": torch.zeros(1)}, lambda: None, b"text")
    assert len(graphs) == 1
    state: Any = SimpleNamespace(restore=lambda: None)
    monkeypatch.setattr(programs, "_graphs", graphs)
    monkeypatch.setattr(programs, "_text", lambda program: b"text")
    monkeypatch.setattr(programs, "_program", lambda text: (SimpleNamespace(can_be_captured=True), {}, state, None))
    monkeypatch.setattr(programs, "_replay", fail)
    nothing: dict[str, Tensor] = {}
    with pytest.raises(RuntimeError, match="out of memory"):
        programs.fill_batch([nothing], {PROGRAM: torch.zeros(1)}, [nothing])
    assert len(graphs) == 0
