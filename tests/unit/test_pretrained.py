"""What tells a module of the leader's from that of another machine."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from diffusers import UNet2DModel

from drp.diffusers.pretrained import describe_module, digests_of, load, loading_of
from drp.diffusers.publish import fingerprint


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 5), nn.Conv2d(2, 2, 3)
        self.register_buffer("scale", torch.ones(()))
        self.steps = {"a": 1, "b": [torch.arange(3)]}
        self.act: Callable[[torch.Tensor], torch.Tensor] = nn.functional.relu
        self.again = self.first


def test_modules_that_are_alike_have_the_same_digests() -> None:
    assert digests_of(Net()) == digests_of(Net())
    reordered = Net()
    reordered.steps = dict(reversed(reordered.steps.items()))
    assert digests_of(reordered) == digests_of(Net())


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda net: net.first.weight.data.view(-1)[7].add_(1e-7), "weights"),
        (lambda net: net.scale.fill_(2.0), "weights"),
        (lambda net: net.steps.update(a=2), "structure"),
        (lambda net: net.steps["b"][0].add_(1), "structure"),
        (lambda net: setattr(net, "act", nn.functional.silu), "structure"),
        (lambda net: setattr(net, "again", net.last), "structure"),
        (lambda net: setattr(net.last, "stride", (2, 2)), "structure"),
        (lambda net: net.last.to(memory_format=torch.channels_last), "structure"),
        (lambda net: net.eval(), "structure"),
        (lambda net: setattr(net, "act", nn.GELU()), "structure"),
    ],
)
def test_every_change_has_another_digest(change: Callable[[Net], object], differs: str) -> None:
    changed, known = Net(), digests_of(Net())
    change(changed)
    found = digests_of(changed)
    assert {name for name in known if known[name] != found[name]} == {differs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool, torch.int64])
@pytest.mark.parametrize("count", [0, 1, 31, 256, 300])
def test_a_fingerprint_sees_every_byte_and_where_it_is(dtype: torch.dtype, count: int) -> None:
    tensor = torch.zeros(count + 1, dtype=dtype)[1:]  # not aligned to 8 bytes
    seen = {fingerprint(tensor)}
    for place in range(count):
        tensor.zero_()
        tensor[place] = 1
        seen.add(fingerprint(tensor))
    assert len(seen) == count + 1
    assert fingerprint(tensor) == fingerprint(tensor.clone())


def test_workers_of_one_machine_share_the_pages_of_a_file_of_weights(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    UNet2DModel(sample_size=8, **blocks).save_pretrained(tmp_path / "unet")
    leaders = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    module = load(describe_module("unet", leaders, loading_of(None, str(tmp_path))))
    maps = re.findall(r"^(\w+)-(\w+) .*\.safetensors$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    mapped = [range(int(first, 16), int(last, 16)) for first, last in maps]
    assert all(any(p.data_ptr() in each for each in mapped) for p in module.parameters())
