"""GPUs by name: which one is meant, and what is said where there is none. None is needed for this."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import drp
from drp.leader import devices as devices_module
from drp.leader import gpus
from drp.leader.devices import expand_count, parse_devices
from drp.leader.gpus import Gpu, near_cores, near_node, parse_cores, visible, why_none

FIRST, SECOND = "GPU-5a1b2c3d-0000-1111-2222-333344445555", "GPU-5a1b9999-aaaa-bbbb-cccc-ddddeeeeffff"
TWO = (Gpu(0, FIRST, "one", cores=(0,)), Gpu(1, SECOND, "two"))

without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")


def names(devices: str) -> list[str]:
    return [device.name for device in parse_devices(devices, 1, lambda: TWO)]


def test_gpus_are_named_by_number_in_turn_or_by_uuid() -> None:
    assert names("cuda:1") == ["cuda:1"]
    assert names("4xcuda") == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert names("2xcuda:1,cuda") == ["cuda:1", "cuda:1", "cuda:0"]
    assert (
        names(f"cuda:{SECOND}") == names("cuda:5a1b9999") == names("cuda:gpu-5a1b9".replace("gpu", "GPU")) == ["cuda:1"]
    )


def test_a_count_is_of_gpus_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices_module, "has_gpus", lambda: True)
    assert names("2") == [device.name for device in parse_devices(1, 1, lambda: TWO)] + ["cuda:1"]
    assert names("2xcpu")[0] == "cpu:0"
    why = "devices is 3, but there are 2 GPUs; ask for at most 2, or name them: '3xcuda' has workers share GPUs"
    with pytest.raises(ValueError, match=re.escape(why)):
        names("3")
    with pytest.raises(ValueError, match="devices is 2, but there is one GPU"):
        parse_devices(2, 1, lambda: TWO[:1])
    monkeypatch.setattr(devices_module, "has_gpus", lambda: False)
    assert names("2")[0] == "cpu:0"


def test_a_count_is_of_the_kind_that_is_asked_for() -> None:
    assert expand_count(2, "cuda", lambda: TWO) == ["cuda:0", "cuda:1"]
    assert expand_count(1, "cuda", lambda: TWO, first=1) == ["cuda:1"]  # that of the pipeline
    assert expand_count("2", "cuda", lambda: TWO, first=1) == ["cuda:1", "cuda:0"]
    assert expand_count("3", "cpu") == ["cpu"] * 3
    assert expand_count("emulated:1ms", "cuda") == "emulated:1ms"
    with pytest.raises(ValueError, match="devices is 2, but there are no workers on mps devices; name cpu or cuda"):
        expand_count(2, "mps")


def test_a_gpus_worker_is_told_its_uuid_and_runs_on_the_cores_beside_it() -> None:
    one, two = parse_devices("cuda:0,cuda:1", 1, lambda: TWO)
    assert (one.gpu, one.cores, one.emulated) == (FIRST, (0,), None)
    assert two.gpu == SECOND
    assert len(two.cores) >= 1  # all that the process may use, if the kernel does not say which are near


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        ("cuda:2", "'cuda:2' does not exist; there is cuda:0 (GPU-5a1b2c3d"),
        ("cuda:GPU-77777777", "'cuda:GPU-77777777' does not exist"),
        ("cuda:5a1b", "'cuda:5a1b' is more than one GPU"),
        ("cuda:", "'cuda:' is not a GPU; write cuda, cuda:0"),
        ("cuda:x", "'cuda:x' is not a GPU"),
        ("cuda:0,cpu:0", "do not mix"),
        ("emulated:1ms,cuda", "do not mix"),
    ],
)
def test_what_is_no_gpu_is_refused(devices: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match=re.escape(words)):
        names(devices)


def test_numbers_count_within_cuda_visible_devices_and_errors_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{FIRST},{SECOND}")
    with pytest.raises(
        ValueError, match=r"names by UUID 'GPU-5a1b2c3d.*numbers count within it: there is cuda:0 \(GPU"
    ):
        names("cuda:2")
    said = visible({"CUDA_VISIBLE_DEVICES": "0,GPU-11112222,3"}, TWO[:1])
    assert "CUDA shows 1 of its 3, for it stops at the first that does not exist" in said


@without_cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:0", f"cuda:{FIRST}", "4xcuda"])
def test_a_torch_without_cuda_is_named(device: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be used: torch .* is built without CUDA; install a build with it"):
        drp.sample("digits", labels=[1], devices=device)


def test_each_reason_for_no_gpu_is_told_from_the_others() -> None:
    assert "built without CUDA" in why_none("2.11.0+cpu", None, True, {})
    assert "no NVIDIA driver: libcuda.so.1" in why_none("2.11.0", "13.0", False, {})
    assert "CUDA_VISIBLE_DEVICES is ''" in why_none("2.11.0", "13.0", True, {"CUDA_VISIBLE_DEVICES": ""})
    assert "CUDA_VISIBLE_DEVICES is 'GPU-1'" in why_none("2.11.0", "13.0", True, {"CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert "too old" in why_none("2.11.0", "13.0", True, {})


def test_a_torch_without_uuids_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "has_gpus", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: object())
    with pytest.raises(ValueError, match=r"torch .* does not know the UUIDs of GPUs; install torch 2.5 or newer"):
        gpus.find_gpus()


def test_cores_beside_a_gpu_are_read_from_sysfs(tmp_path: Path) -> None:
    place = tmp_path / "0000:17:00.0"
    place.mkdir()
    (place / "local_cpulist").write_text("0-3,8,10-11\n")
    assert near_cores("0000:17:00.0", {1, 2, 8, 9}, tmp_path) == (1, 2, 8)
    assert near_cores("0000:99:00.0", {1}, tmp_path) == ()
    (place / "numa_node").write_text("1\n")
    assert (near_node("0000:17:00.0", tmp_path), near_node("0000:99:00.0", tmp_path)) == (1, None)
    (place / "numa_node").write_text("-1\n")  # a machine with one
    assert near_node("0000:17:00.0", tmp_path) is None
    assert parse_cores("") == set()


def test_nothing_touches_cuda_at_import_time() -> None:
    code = """
import torch, sys, importlib, pkgutil
def touched(*a, **k): raise AssertionError("CUDA was touched at import time")
for name in ("_lazy_init", "init", "is_available", "device_count", "get_device_properties", "current_device"):
    setattr(torch.cuda, name, touched)
import drp
extras = ("drp.diffusers", "drp.http")
for found in pkgutil.walk_packages(drp.__path__, "drp."):
    if "__main__" not in found.name and not found.name.startswith(extras):
        importlib.import_module(found.name)
maps = open("/proc/self/maps").read()
assert "libcuda.so" not in maps and "libnvidia-ml" not in maps and "pynvml" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
