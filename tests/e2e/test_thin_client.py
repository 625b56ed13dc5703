"""The client on a machine that has numpy, pyzmq and msgpack alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import drp
from drp import Client, Leader
from drp.client.options import to_submit
from drp.protocol.arrays import add_array, find_library, take_array
from drp.protocol.codec import encode
from drp.protocol.frames import FrameReader, FrameWriter
from tests.serving import ROOT, serving

BARE = """
import sys, time

ALLOWED = {"drp", "numpy", "zmq", "msgpack", "_distutils_hack"}

class Bare:
    def find_spec(self, name, path=None, target=None):
        first = name.partition(".")[0]
        if first not in ALLOWED and first not in sys.stdlib_module_names and not first.startswith("_"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in list(sys.modules):  # what an environment's own start-up may have brought
    assert name.partition(".")[0] not in ("torch", "psutil", "safetensors"), name
sys.meta_path.insert(0, Bare())
began = time.process_time()
from drp.client import Client
seconds = time.process_time() - began
[kibibytes] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")]
"""


def bare(program: str, *arguments: str) -> str:
    env = {name: each for name, each in os.environ.items() if name not in ("COVERAGE_PROCESS_START",)}
    command = [sys.executable, "-c", BARE + program, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_small() -> None:
    seconds, kibibytes = map(float, bare("print(seconds, kibibytes)").split())
    assert kibibytes < 60 * 1024
    assert seconds < 3  # 0.15 where nothing else runs; processor time, not that of a clock


@pytest.fixture
def address(tiny: Leader, tmp_path: Path) -> Iterator[str]:
    with serving(tiny, tmp_path) as server:
        yield server.address


def test_it_samples_without_torch(address: str, tmp_path: Path) -> None:
    program = """
import numpy as np
with Client(sys.argv[1]) as client:
    run = client.submit(labels=np.array([3, 1]), seed=4, steps=9, previews=3)
    previews = [update.preview for update in run.progress() if update.preview is not None]
    result = run.result(20)
    large = client.sample(labels=[1] * 2000, steps=2).samples  # in shared memory
    noise = np.linspace(-1, 1, 64, dtype=">f4").reshape(1, 1, 8, 8)
    own = client.sample(labels=[2], noise=noise, steps=3).samples
    try:
        client.sample(labels=[11])
    except ValueError as error:
        assert "label 11 is out of range" in str(error)
assert all(type(each) is np.ndarray for each in (*previews, result.samples, large))
assert "torch" not in sys.modules
result.samples[0] += 0  # It may be written to.
np.savez(sys.argv[2], samples=result.samples, large=large, own=own, last=previews[-1])
"""
    bare(program, address, str(tmp_path / "samples.npz"))
    noise = torch.from_numpy(np.linspace(-1, 1, 64, dtype=np.float32)).view(1, 1, 8, 8)
    with np.load(tmp_path / "samples.npz") as found:
        expected: dict[str, Any] = {
            "samples": {"labels": [3, 1], "seed": 4, "steps": 9},
            "last": {"labels": [3, 1], "seed": 4, "steps": 9},
            "large": {"labels": [1] * 2000, "steps": 2},
            "own": {"labels": [2], "noise": noise, "steps": 3},
        }
        for name, options in expected.items():
            samples = drp.reference("tests.denoisers:Tiny", devices=2, **options).samples
            np.testing.assert_array_equal(found[name], samples.numpy(), err_msg=name)


def test_arrays_are_of_the_library_that_was_asked_for(address: str) -> None:
    with Client(address, arrays="numpy") as client:
        assert isinstance(client.sample(labels=[1], steps=3).samples, np.ndarray)
    with Client(address) as client:
        assert isinstance(client.sample(labels=[1], steps=3).samples, torch.Tensor)
    with pytest.raises(ValueError, match="arrays is 'jax'; choose 'numpy' or 'torch'"):
        find_library("jax")  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int8, torch.bool]
)
def test_arrays_of_every_kind_arrive(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).view(2, 3).T.to(dtype)
    values: list[Any] = [tensor, tensor.requires_grad_(dtype.is_floating_point)]
    if dtype != torch.bfloat16:
        values += [
            tensor.detach().numpy(),
            tensor.detach().numpy().astype(tensor.detach().numpy().dtype.newbyteorder(">")),
        ]
    for value in values:
        writer = FrameWriter()
        data = add_array(writer, "x", value)
        assert torch.equal(take_array(FrameReader(writer.frames), data, "torch"), tensor.detach())
        assert len(FrameReader(writer.frames).take_bytes(data)) == tensor.numel() * tensor.itemsize


def test_a_request_has_the_values_that_its_arrays_had_when_it_was_submitted() -> None:
    """The connection's thread sends it later, when the caller may have reused them."""
    noise, image, cond = torch.ones(2, 3), np.ones((2, 3), np.float32), torch.ones(5)
    expected = [cond.numpy().tobytes(), noise.numpy().tobytes(), image.tobytes()]
    _, frames = to_submit(1, {"noise": noise, "image": image, "cond": {"c": cond}}, {})
    noise[:], image[:], cond[:] = 7, 7, 7
    assert [bytes(frame) for frame in frames] == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "x is a int; give a tensor, or a numpy array"),
        (np.array(["a"]), "x is str32; choose one of float64"),
        (np.zeros(1, np.uint16), "x is uint16; choose one of"),
        (torch.zeros(1, device="meta"), r"x is on meta; call .cpu\(\) first"),
        (np.zeros((1,) * 17), "17 dimensions; at most 16"),
    ],
    ids=str,
)
def test_what_cannot_be_sent_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_array(FrameWriter(), "x", value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": 3}, "labels is 3; give a list of numbers"),
        ({"shape": "4,8,8"}, "shape is '4,8,8'; give a list of numbers"),
        ({"grid": "karras"}, "grid is 'karras'; give a mapping of names to values"),
        ({"cond": [1]}, r"cond is \[1\]; give a mapping of names to values"),
    ],
)
def test_options_of_a_wrong_type_are_refused_before_they_are_sent(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        to_submit(1, options, {})  # type: ignore[arg-type]  # what is tested


def test_numbers_of_numpy_and_torch_are_sent() -> None:
    numbers = {"steps": np.int64(12), "seed": torch.tensor(3), "guidance": np.float32(2.0), "labels": [np.uint8(1)]}
    submit, _ = to_submit(1, numbers, {})  # type: ignore[arg-type]  # what is tested
    encode(submit)
    assert (submit.steps, submit.seed, submit.guidance, submit.labels) == (12, 3, 2.0, (1,))


@pytest.mark.parametrize("address", [Path("/tmp/server"), None, "http://localhost:8000"])
def test_what_is_not_an_address_is_refused(address: Any) -> None:
    with pytest.raises(ValueError, match=r"address is .*; give ipc://PATH, or tcp://HOST:PORT with server_key and key"):
        Client(address)
