"""One client of the soak, in a process of its own, that knows the specification alone.

`python -m tests.soak_client ADDRESS NUMBER COUNT`, and on stdin, as JSON, the SHA-256 of the samples of each seed. It
writes one line, what became of its requests.
"""

from __future__ import annotations

import array
import hashlib
import json
import random
import sys

from tests.plain_client import Plain


def main() -> None:
    address, number, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    expected: list[str] = json.load(sys.stdin)
    draws = random.Random(number)
    told = {"finished": 0, "cancelled": 0, "left": 0, "wrong": 0}
    plain = Plain(address)
    plain.open()
    for request in range(count):
        seed, what = draws.randrange(len(expected)), draws.random()
        memory, slow = draws.random() < 0.5, what > 0.7
        length = {"steps": 900, "sweeps": 50} if slow else {"steps": 9}
        plain.submit(request, labels=[seed % 10], seed=seed, memory=memory, progress=slow, previews=7 * slow, **length)
        plain.receive("Accepted")
        if what > 0.85:  # It goes away in the middle, and comes back as another.
            plain.receive("Progress")
            plain.close()
            plain = Plain(address)
            plain.open()
            told["left"] += 1
            continue
        if slow:
            plain.receive("Progress")
            plain.send("Cancel", request=request)
        while (message := plain.receive("Progress", "Finished", "Ended"))["type"] == "Progress":
            continue
        if message["type"] == "Ended":
            told["cancelled"] += message["code"] == "cancelled"
            continue
        digest = hashlib.sha256(array.array("f", plain.floats(message["samples"])).tobytes()).hexdigest()
        if memory and draws.random() < 0.8:  # Else it forgets to, and the server has to see to it.
            plain.send("Ack", request=request)
        told["finished"] += 1
        told["wrong"] += slow or digest != expected[seed] or message["request"] != request
    plain.close()
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
