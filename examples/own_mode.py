"""A custom mode: short blocks at first, where states change most, and longer ones later.

    python examples/own_mode.py

A mode yields rounds. Each round has the index from which it starts (`base`) and the indices that are predicted in
parallel. The run makes the drafts and refines the states. It raises ValueError for invalid rounds.
"""

from dataclasses import dataclass

import drp
from drp.sampling.drafts import DAMPED, DraftRule
from drp.sampling.modes import Mode, Round, Rounds


@dataclass(frozen=True)
class Growing(Mode):
    """Blocks of 1, 2, 3, ... up to n drafts, each starting from the last prediction of the previous one."""

    n: int
    rule: DraftRule = DAMPED

    @property
    def width(self) -> int:
        """The maximum number of drafts per round."""
        return self.n

    def rounds(self, steps: int) -> Rounds:
        """Yield the first evaluation, then blocks."""
        yield Round(0, (0,))
        base, length = 0, 1
        while base < steps - 1:
            last = min(base + length, steps - 1)
            yield Round(base, tuple(range(base + 1, last + 1)))
            base, length = last, min(length + 1, self.n)


if __name__ == "__main__":
    exact = drp.reference("digits", labels=range(10), mode="sequential").samples
    for mode in (Growing(4), Growing(8)):
        result = drp.sample("digits", labels=range(10), devices=2, mode=mode)
        errors = (result.samples - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        figures = f"mean {float(errors.mean()):.4f}, median {float(errors.median()):.4f}"
        print(f"at most {mode.n} drafts: {result.rounds} rounds, relative L2 to the sequential run: {figures}")
