"""How much slower is code that has just slept? It explains most of what a round loses on a shared machine.

    python -m bench.cold

A process that sleeps finds its code and data out of the processor's caches. The same few microseconds of work are
timed straight after each other, and after sleeps as long as a short and a long evaluation.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from rich.table import Table

from bench.figures import console, percentile
from drp.protocol.codec import encode
from drp.protocol.messages import Prediction

SLEEPS = (0.0, 0.001, 0.02)
TIMES = 60


def measure(work: Callable[[], object], sleep: float) -> float:
    """Return the median seconds of one piece of work, each after a sleep."""
    taken = []
    for _ in range(TIMES):
        if sleep:
            time.sleep(sleep)
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return percentile(taken, 50)


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    message, states, weights, term = Prediction(1, 2, 3, 0.02), torch.zeros(8, 784), torch.ones(8, 1), torch.ones(784)
    pieces: dict[str, Callable[[], object]] = {
        "encode a Prediction": lambda: encode(message),
        "add a term to 8 rows of 784": lambda: states.addcmul_(weights, term),
    }
    table = Table("us, median", *("at once" if not s else f"after {s * 1e3:g} ms" for s in SLEEPS))
    for name, work in pieces.items():
        table.add_row(name, *(f"{measure(work, sleep) * 1e6:.1f}" for sleep in SLEEPS))
    console().print(table)


if __name__ == "__main__":
    main()
