"""The residual of a draft: its distance from the refined state."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def residual(x: Tensor, draft: Tensor, samples: int) -> float:
    """Return the relative distance of a state [B * D] from the draft at its index, the maximum over the samples.

    numpy is used because its order of summation does not depend on the number of threads, so that a mode's decisions
    are reproducible.
    """
    x = x.double()
    difference = (x - draft.double()).view(samples, -1).cpu().numpy()
    norms = np.sqrt(np.square(difference).sum(axis=1) / np.square(x.view(samples, -1).cpu().numpy()).sum(axis=1))
    return float(norms.max())
