"""A process that opens another's memory on a GPU: `python -m tests.gpu.peer WHAT`, the handles in JSON on its input."""

from __future__ import annotations

import json
import sys

import torch

from drp.protocol.cuda import GpuCounters, GpuMemory, WorkerCounter, index_of, invert_probe
from drp.protocol.handles import GpuHandle, Handle
from drp.protocol.memory import ALIGNMENT

SLEEP = 2_000_000_000
"""Cycles for which a stream is kept busy: about a second."""


def main() -> int:
    """Turn the memory over; follow its owner and say what its first number is then; or write one, much later."""
    fields = json.loads(sys.stdin.readline())
    handle = GpuHandle(
        fields["device"], fields["nbytes"], bytes.fromhex(fields["memory"]), bytes.fromhex(fields["event"])
    )
    torch.cuda.set_device(index_of(handle.device))
    memory = GpuMemory.open(handle)
    if sys.argv[1] == "turn":
        invert_probe(memory)
        print("turned", flush=True)
        return 0
    if sys.argv[1] == "write":
        own = WorkerCounter(GpuCounters.open(Handle(*fields["numbers"])), 3)
        zero, nine = (torch.full((1,), number, device="cuda") for number in (0, 9))
        # To load code waits for the GPU: that is done before there is something to wait for.
        memory.tensor(ALIGNMENT, (1,), torch.int64).fill_(int(zero[zero]))
        torch.cuda.synchronize()
        for _ in range(int(fields["seconds"])):
            torch.cuda._sleep(SLEEP)  # type: ignore[no-untyped-call]  # torch has no types for it
        if fields["asserts"]:
            zero[nine]
        memory.tensor(0, (1,), torch.int64).fill_(42)
        own.record()
        print("recorded", flush=True)
        sys.stdin.readline()
        return 0
    print("open", flush=True)
    sys.stdin.readline()
    memory.wait_event()
    print(int(memory.tensor(0, (1,), torch.int64).cpu()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
