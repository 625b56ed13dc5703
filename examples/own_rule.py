"""A custom draft rule: the carry depends on the noise level.

    python examples/own_rule.py

At high noise the estimate of the clean sample hardly depends on the state, so the estimate made at a draft also holds
at the refined state; at low noise the estimate follows the state. A rule overrides `carry_at`, `extrapolate` or both.
`drp.sample` and `drp.diffusers.parallelize` accept the same object.
"""

from dataclasses import dataclass

import drp
from drp.sampling.drafts import DraftRule, Levels


@dataclass(frozen=True)
class ByNoise(DraftRule):
    """The carry is the share of the noise in the state's variance, between two bounds."""

    minimum: float = 0.2
    maximum: float = 0.8

    def carry_at(self, k: int, levels: Levels) -> float:
        """Return the carry at index k."""
        noise, signal = levels.sigmas[k] ** 2, levels.alphas[k] ** 2
        return self.minimum + (self.maximum - self.minimum) * noise / (noise + signal)


if __name__ == "__main__":
    exact = drp.reference("digits", labels=range(10), mode="sequential").samples
    for rule in ("paper", "damped", ByNoise()):
        result = drp.reference("digits", labels=range(10), drafts=8, rule=rule)
        errors = (result.samples - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        figures = f"mean {float(errors.mean()):.4f}, median {float(errors.median()):.4f}"
        print(f"{rule}: {result.rounds} rounds, relative L2 to the sequential run: {figures}")
