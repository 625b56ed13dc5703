"""Naive: draft and refine in plain tensors, for DDIM and networks that predict noise: to be read, and to test by.

What `drp.sampling` does with rows of coefficients, for any solver, is done here as one reads it. DRiffusion, arXiv
2603.25872; `stride` is where we go past it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def draft_and_refine(
    denoise: Callable[[Tensor, float], Tensor], x: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor, n: int, stride: int
) -> tuple[Tensor, int]:
    """Return the sample [B, ...] and the number of rounds, 1 + ceil((N - 1) / stride).

    denoise(x, t) predicts the noise in a state x [B, ...]. t [N] are the timesteps; alpha and sigma [N + 1] are the
    amounts of signal and noise. A round has n drafts and advances by `stride` steps, 1 to n. Stride n is the paper's
    aggressive mode, stride 1 the ordinary loop.
    """
    last = len(t) - 1

    def ddim(x: Tensor, noise: Tensor, a: int, b: int) -> Tensor:
        data = (x - sigma[a] * noise) / alpha[a]
        return alpha[b] * data + sigma[b] * noise

    k, rounds, noise = 0, 1, {0: denoise(x, float(t[0]))}
    while k < last:
        # Draft: steps with the predictions there are, and from the last of them on skip transitions.
        drafts = {k: x}
        for j in range(k + 1, min(k + n, last) + 1):
            newest = min(j - 1, max(noise))
            drafts[j] = ddim(drafts[newest], noise[newest], newest, j)
        # Predict: all at once, one per device.
        noise.update({j: denoise(drafts[j], float(t[j])) for j in drafts if j > k})
        rounds += 1
        # Refine: the ordinary steps, with the noise that was predicted at the drafts.
        for j in range(k, min(k + stride, last)):
            x = ddim(x, noise[j], j, j + 1)
        k = min(k + stride, last)
    return ddim(x, noise[last], last, last + 1), rounds
