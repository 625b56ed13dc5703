"""The doctor's peer: `python -m drp.doctor_peer UUID`, a process on that GPU, turns over memory of its parent's.

It is given the memory's handles in JSON on its input, where no one else can read them, and answers with a list: for
each why it could not be reached, empty if it was.
"""

from __future__ import annotations

import json
import sys

import torch

from drp.protocol.codec import ProtocolError
from drp.protocol.cuda import GpuMemory, index_of, turn_over
from drp.protocol.messages import GpuHandle


def main() -> None:
    """Try one after the other."""
    _sit_down(sys.argv[1])
    answers = []
    for device, nbytes, memory, event in json.load(sys.stdin):
        try:
            turn_over(GpuMemory.open(GpuHandle(device, nbytes, bytes.fromhex(memory), bytes.fromhex(event))))
            answers.append("")
        except (ProtocolError, RuntimeError) as error:  # a CudaError is a RuntimeError
            answers.append(str(error))
    sys.stdout.write(json.dumps(answers) + "\n")


def _sit_down(uuid: str) -> None:
    torch.cuda.set_device(index_of(uuid))


if __name__ == "__main__":
    main()
