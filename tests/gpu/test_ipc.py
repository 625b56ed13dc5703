"""CUDA IPC between processes on one GPU: memory, the order of record and wait, and that nothing of it stays."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import torch

from drp.protocol.cuda import GpuCounters, GpuMemory, GpuStream, WorkerCounterView, is_inverted

SLEEP = 2_000_000_000
"""Cycles for which a stream is kept busy: about a second."""


@pytest.fixture
def memory(uuid: str) -> Iterator[GpuMemory]:
    made = GpuMemory.create(1 << 16, uuid, lambda memory: None)
    yield made
    made.free()


def peer(what: str, memory: GpuMemory, *before: str, **more: object) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "tests.gpu.peer", what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    handle = memory.ipc_handles[1]
    assert handle is not None
    assert process.stdin is not None
    fields = {"device": handle.device, "nbytes": handle.nbytes, "memory": handle.memory.hex()}
    process.stdin.write(json.dumps({**fields, "event": handle.event.hex(), **more}) + "\n")
    process.stdin.flush()
    return process


def pattern(memory: GpuMemory) -> torch.Tensor:
    numbers = (torch.arange(memory.nbytes) % 251).to(torch.uint8)
    memory.tensor(0, (memory.nbytes,), torch.uint8).copy_(numbers)
    memory.record_event()
    return numbers


def test_another_process_reads_and_writes_it(memory: GpuMemory) -> None:
    numbers = pattern(memory)
    out, error = peer("turn", memory).communicate(timeout=120)
    assert out == "turned\n", error
    assert is_inverted(memory, numbers)


def test_a_peer_that_follows_sees_what_was_queued_before_the_record(memory: GpuMemory) -> None:
    number = memory.tensor(0, (1,), torch.int64)
    process = peer("follow", memory)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    number.fill_(1)  # To load code waits for the GPU.
    torch.cuda.synchronize()
    began = time.perf_counter()
    torch.cuda._sleep(SLEEP)  # type: ignore[no-untyped-call]  # torch has no types for it
    number.fill_(42)
    memory.record_event()
    assert not torch.cuda.current_stream().query()  # else there is nothing to wait for
    queued = time.perf_counter() - began
    process.stdin.write("go\n")
    out, error = process.communicate(timeout=120)
    print(f"queued in {queued * 1e6:.0f} us, answered after {time.perf_counter() - began:.2f} s")
    assert out == "42\n", error


@pytest.fixture
def numbers() -> Iterator[GpuCounters]:
    made = GpuCounters.create()
    yield made
    made.free()


@pytest.mark.parametrize("fate", ["lives", "is killed", "loses its context"])
def test_the_owner_waits_for_a_number_that_a_peer_writes(memory: GpuMemory, numbers: GpuCounters, fate: str) -> None:
    """On a stream, not on the host; and a peer that is gone is not waited for, once that is known."""
    number, record, stream = (
        memory.tensor(0, (1,), torch.int64),
        WorkerCounterView(numbers, 3),
        GpuStream(memory.device),
    )
    handle, seconds = numbers.handle, 20 if fate == "is killed" else 2
    more = {"numbers": [handle.pid, handle.fd, handle.nbytes], "asserts": fate == "loses its context"}
    process = peer("write", memory, seconds=seconds, **more)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "recorded\n"
    began = time.perf_counter()
    seen = torch.full((1,), -1, dtype=torch.int64, pin_memory=True)
    with stream.current:
        record.wait()
        seen.copy_(number, non_blocking=True)
    mark, queued = stream.record(), time.perf_counter() - began
    assert not stream.query(mark)
    if fate != "lives":
        time.sleep(3.0)
        process.kill()
        process.communicate(timeout=60)
        assert not stream.query(mark)
        record.release()
    while not stream.query(mark):
        assert time.perf_counter() - began < 60, "the stream still waits"
        time.sleep(0.01)
    print(f"queued in {queued * 1e6:.0f} us, passed after {time.perf_counter() - began:.2f} s, read {int(seen)}")
    assert int(seen) == (42 if fate == "lives" else 0)
    if fate == "lives":
        process.communicate("end\n", timeout=60)


def test_memory_is_freed(uuid: str) -> None:
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    for _ in range(50):
        GpuMemory.create(1 << 26, uuid, lambda memory: None).free()
    after, _ = torch.cuda.mem_get_info()
    assert before - after < 1 << 26


def test_more_than_there_is_is_a_memory_error(uuid: str) -> None:
    with pytest.raises(MemoryError, match="bytes on GPU-"):
        GpuMemory.create(1 << 45, uuid, lambda memory: None)
    assert float(torch.ones(2, device="cuda").sum()) == 2.0  # and torch does not find the error afterwards


def test_the_sanitizer_finds_nothing(memory: GpuMemory) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    numbers = pattern(memory)
    process = peer("turn", memory, sanitizer, "--error-exitcode", "9")
    out, error = process.communicate(timeout=110)
    assert process.returncode == 0, out + error
    assert is_inverted(memory, numbers)
