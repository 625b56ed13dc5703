"""The programs and modules that a worker of pipelines keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from drp.diffusers.program import PROGRAM, Call, Leaf, Program
from drp.diffusers.pytree import flatten
from drp.diffusers.worker import ChangeDetector, LoadedProgram, Programs
from drp.models.gpu import Graphs
from drp.models.state import ModuleState


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
    program = Program((Call("unet", flatten(([torch.zeros(1)], {}))[0], (), flatten(torch.zeros(1))[0]),))
    loaded = LoadedProgram(program, {}, ModuleState(), ChangeDetector({}))
    monkeypatch.setattr(programs, "_graphs", graphs)
    monkeypatch.setattr(programs, "_text", lambda program: b"text")
    monkeypatch.setattr(programs, "_program", lambda text: loaded)
    monkeypatch.setattr(programs, "_replay", fail)
    nothing: dict[str, Tensor] = {}
    with pytest.raises(RuntimeError, match="out of memory"):
        programs.fill_batch([nothing], {PROGRAM: torch.zeros(1)}, [nothing])
    assert len(graphs) == 0


def test_a_timestep_on_the_host_lies_with_the_latents_for_several_drafts() -> None:
    """Modules take one number from the host, but none for each sample. Here the GPU is the meta device."""
    given: list[torch.device] = []

    def module(x: Tensor, t: Tensor) -> Tensor:
        given.append(t.device)
        assert t.shape == (4,)
        return x * 2

    leaves = Leaf("input", "x"), Leaf("input", "t", on_host=True)
    arguments = flatten(([torch.zeros(1), torch.zeros(1)], {}))[0]
    program = Program((Call("unet", arguments, leaves, flatten(torch.zeros(1))[0]),), samples=2)
    drafts = [{"x": torch.empty(2, 3, device="meta"), "t": torch.empty((), device="meta")} for _ in range(2)]
    program.run_batch({"unet": module}, drafts, {}, [{"0.0": torch.empty(2, 3, device="meta")} for _ in drafts])
    assert given == [torch.device("meta")]
