"""Other parallel-in-time samplers, each written after its paper: CHORDS, SRDS and ParaDiGMS.

They share an evaluator that counts rounds, and step by the transition of DDIM (Euler's on flow matching), as the
sequential run does that they approximate. A round evaluates at most as many states as there are devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from drp.sampling.predictions import estimates
from drp.sampling.reference import Denoiser
from drp.sampling.solvers import Solver


@dataclass
class Problem:
    """A sampling run: the denoiser, the grid, the first state [B, ...] and the number of devices.

    rounds, evaluations: counted by `predict`.
    """

    denoiser: Denoiser
    solver: Solver
    start: Tensor
    cond: Mapping[str, Tensor]
    devices: int
    rounds: int = field(default=0, init=False)
    evaluations: int = field(default=0, init=False)

    @property
    def steps(self) -> int:
        return self.solver.grid.steps

    def predict(self, states: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """Evaluate states at their indices at the same time: one round."""
        if not 0 < len(states) <= self.devices:
            raise ValueError(f"{len(states)} states in a round of {self.devices} devices")
        self.rounds += 1
        self.evaluations += len(states)
        count = len(self.start)
        t = torch.cat([torch.full((count,), float(self.solver.grid.timesteps[k])) for _, k in states])
        cond = {name: torch.cat([v] * len(states)) if v.dim() else v for name, v in self.cond.items()}
        with torch.inference_mode():
            return list(self.denoiser(torch.cat([x for x, _ in states]), t, cond).chunk(len(states)))

    def transition(self, x: Tensor, prediction: Tensor, a: int, b: int) -> Tensor:
        """Go from index a to index b with the prediction at a: alpha_b data + sigma_b epsilon."""
        (alpha, sigma), (alpha_b, sigma_b) = self.solver.at(a), self.solver.grid.landing(b - 1)
        e = estimates(self.solver.prediction_type, alpha, sigma)
        by_x = alpha_b * e.data_x + sigma_b * e.epsilon_x
        by_prediction = alpha_b * e.data_p + sigma_b * e.epsilon_p
        return by_x * x + by_prediction * prediction


@dataclass
class _Core:
    """A core of CHORDS: a solver that is at `index`, and the anchor, where a slower core has last corrected it."""

    index: int
    x: Tensor
    anchor: int
    anchor_x: Tensor
    anchor_prediction: Tensor | None = None


def chords(problem: Problem, starts: Sequence[int]) -> Tensor:
    """CHORDS (Han et al., ICCV 2025, arXiv 2507.15260): solvers start at rising indices, the slower correct the faster.

    The core j starts at index starts[j], which it reaches by one coarse step from the start of the core before, a round
    later. All cores take ordinary steps. When a core has come to the anchor of the next one, that is corrected: what a
    coarse step from the anchor would have been is exchanged for one from the slower core's state there. Returned is the
    state of the last core, which arrives first: after len(starts) - 1 + N - starts[-1] rounds.
    """
    if list(starts) != sorted(set(starts)) or starts[0] != 0 or starts[-1] >= problem.steps:
        raise ValueError(f"starts are {list(starts)}; give rising indices from 0 to below {problem.steps}")
    cores = [_Core(0, problem.start, 0, problem.start)]
    while cores[-1].index < problem.steps:
        predictions = problem.predict([(core.x, core.index) for core in cores])
        before = [(core.index, core.x) for core in cores]
        newest = cores[-1]
        started = None
        if newest.index == starts[len(cores) - 1] and len(cores) < len(starts):
            following = starts[len(cores)]
            x = problem.transition(newest.x, predictions[-1], newest.index, following)
            started = _Core(following, x, following, x)
        for j, core in enumerate(cores):
            if core.index == core.anchor:
                core.anchor_prediction = predictions[j]
            k = core.index + 1
            stepped = problem.transition(core.x, predictions[j], core.index, k)
            if j and before[j - 1][0] == core.anchor:
                assert core.anchor_prediction is not None
                coarse = problem.transition(core.anchor_x, core.anchor_prediction, core.anchor, k)
                corrected = problem.transition(before[j - 1][1], predictions[j - 1], core.anchor, k)
                stepped = stepped - coarse + corrected
                core.anchor, core.anchor_x, core.anchor_prediction = k, stepped, None
            core.index, core.x = k, stepped
        if started is not None:
            cores.append(started)
    return cores[-1].x


@dataclass
class _Block:
    """A block of SRDS in one iteration: where its fine solver is, and the coarse step from its start."""

    x: Tensor
    index: int
    coarse: Tensor | None = None


def srds(problem: Problem, blocks: int, iterations: int) -> Tensor:
    """SRDS (Selvam et al., NeurIPS 2024, arXiv 2412.08292): parareal, with one step a block as the coarse solver.

    x^{p+1}_{i+1} = F(x^p_i) + G(x^{p+1}_i) - G(x^p_i): F takes all steps of block i, G one step. Pipelined: a block
    begins as soon as its first state is known, up to the number of devices, earlier iterations and blocks first. G uses
    the first evaluation of F, which is the same. With enough devices, S steps a block and B blocks, p iterations take
    p S + B - p rounds.
    """
    ends = [round(i * problem.steps / blocks) for i in range(blocks + 1)]
    known: dict[tuple[int, int], Tensor] = {(p, 0): problem.start for p in range(iterations + 1)}
    running: dict[tuple[int, int], _Block] = {}

    def fine(p: int, i: int) -> Tensor | None:
        """Return F(x^p_i) if it is known; the first p blocks of iteration p are what they were before."""
        block = running.get((min(p, i), i))
        return block.x if block is not None and block.index == ends[i + 1] else None

    def coarse(p: int, i: int) -> Tensor | None:
        block = running.get((min(p, i), i))
        return None if block is None else block.coarse

    def spread() -> None:
        """Work out all states that follow from what is known."""
        for p in range(iterations + 1):
            for i in range(blocks):
                if (p, i) not in known or (p, i + 1) in known:
                    continue
                if p > i:
                    found = fine(i, i)
                elif p == 0:
                    found = coarse(0, i)
                else:
                    f, now, then = fine(p - 1, i), coarse(p, i), coarse(p - 1, i)
                    found = f + now - then if f is not None and now is not None and then is not None else None
                if found is not None:
                    known[p, i + 1] = found

    while (iterations, blocks) not in known:
        for (p, i), x in known.items():
            if i < blocks and p <= i:
                running.setdefault((p, i), _Block(x, ends[i]))
        open_blocks = [
            key
            for key, block in sorted(running.items())
            if block.index < (ends[key[1] + 1] if key[0] < iterations else ends[key[1]] + 1)
        ][: problem.devices]
        predictions = problem.predict([(running[key].x, running[key].index) for key in open_blocks])
        for key, prediction in zip(open_blocks, predictions, strict=True):
            block = running[key]
            if block.index == ends[key[1]]:
                block.coarse = problem.transition(block.x, prediction, block.index, ends[key[1] + 1])
            block.x = problem.transition(block.x, prediction, block.index, block.index + 1)
            block.index += 1
        spread()
    return known[iterations, blocks]


def paradigms(problem: Problem, tolerance: float) -> Tensor:
    """ParaDiGMS (Shih et al., NeurIPS 2023, arXiv 2305.16317): Picard iterations in a sliding window.

    All states of the window are evaluated, and their drifts added up from its first. The window moves on to the first
    state that has changed by more than the tolerance, which is a share of the noise that ancestral sampling would add
    there, squared and for each number of the state.
    """
    n, steps = problem.devices, problem.steps
    states = [problem.start] * (steps + 1)
    begin = 0
    while begin < steps:
        end = min(begin + n, steps)
        predictions = problem.predict([(states[k], k) for k in range(begin, end)])
        x, before = states[begin], list(states)
        moved = end
        for k, prediction in enumerate(predictions, begin):
            x = x + problem.transition(before[k], prediction, k, k + 1) - before[k]
            change = (x - before[k + 1]).flatten(1).square().mean(dim=1)
            if moved == end and bool((change > tolerance**2 * _variance(problem.solver, k + 1)).any()):
                moved = min(k + 1, end)
            states[k + 1] = x
        for k in range(end + 1, min(moved + n, steps) + 1):
            states[k] = states[end]
        begin = moved
    return states[steps]


def _variance(solver: Solver, k: int) -> float:
    """Return the variance of the noise that ancestral sampling adds in the step from k (Ho et al. 2020)."""
    if k >= solver.grid.steps:
        return 0.0
    (alpha, sigma), (alpha_b, sigma_b) = solver.at(k), solver.grid.landing(k)
    return (sigma_b / sigma) ** 2 * (1 - (alpha / alpha_b) ** 2)
