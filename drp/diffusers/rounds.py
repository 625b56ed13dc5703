"""The rounds of a pipeline's call: which steps are predicted together, from drafts, and the results of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from drp.diffusers.drafting import Drafter, gain_of, outputs_as_branches, weights_of
from drp.diffusers.evaluators import Session
from drp.diffusers.forms import OfState, Point
from drp.diffusers.learned import Learned, UnrecognisedError
from drp.diffusers.program import PART, Program, output_name
from drp.diffusers.report import CallReport
from drp.sampling.advice import doubts
from drp.sampling.modes import Adaptive, Mode, Round, Rounds
from drp.sampling.residuals import residual
from drp.sampling.run import Task

JUMP = 0.25
"""The relative change of the latents between two steps beyond which drafts are replaced by new ones."""

MOST_JUMPS = 2
"""How often drafts are replaced for that before the call continues without drafts."""


class Predictions:
    """The predictions for the steps from the traced one, at index `first`, to `end`, made as they are needed.

    Its state is held by:

        the traced step     `_learned`, `_program`,
                            `_final`                     a step's arguments and results, how they follow from a state
                            `key`                        identifies the encoded program, with its modules
                            `_weights`, `_gain`          how guidance makes one output of the results
        the rounds          `_mode`, `_adaptive`,
                            `_rounds`, `_next`           the mode, its rounds, and the next one, if it is known yet
                            `_first`, `_end`, `_jumps`   where they begin and end, and how often they were restarted
                            `_residuals`                 of the last round, for the adaptive mode
        the predictions     `_session`, `_rows`          the workers' memory, and the rows of each index in it
                            `_drafter`, `_drafts`        makes the drafts; the drafts by index
        the report          `_report`, `_reported`       the report, and the number of reported incidents
    """

    def __init__(
        self,
        learned: Learned,
        drafter: Drafter,
        session: Session,
        mode: Mode,
        first: int,
        end: int,
        report: CallReport,
        program: Program,
        key: int,
    ) -> None:
        self._program, self.key = program, key
        self._learned, self._drafter, self._session = learned, drafter, session
        self._mode, self._adaptive = mode, _adaptive(mode)
        self._end, self._report = end, report
        self._rows: dict[int, list[int]] = {}
        """The rows of the predictions for steps that the pipeline has not taken yet, by index."""
        self._drafts: dict[int, Tensor] = {}
        self._residuals: list[float] | None = None
        self._weights: list[float] | None = None
        self._gain = self._reported = self._jumps = 0
        self._final = _final_results(learned)
        report.doubts = tuple(doubts(len(drafter.timesteps), mode.width, drafter.adds_noise).values())
        self._begin(first)
        self._next: Round | None = self._after()  # The first round was the traced step.

    def fit_guidance(self, x: Tensor, output: Tensor) -> None:
        """Determine from the traced step how guidance combines the results to one output."""
        results = self._learned.outputs
        branches = outputs_as_branches([results[name] for name in self._final], x)
        self._weights = weights_of(branches, output) if branches and output.shape == x.shape else None
        self._gain = gain_of(self._weights)

    def at(self, k: int, x: Tensor, inputs: Mapping[str, Tensor], stepped: Tensor | None) -> dict[str, Tensor]:
        """Return the results of the step at index k with the latents x and the arguments `inputs`.

        `stepped` is the result of the scheduler's last step, if the latents were changed since.
        """
        if self._due(k, x, stepped):
            self._round(k, x, inputs)
        outputs = {name: tensor.clone() for name, tensor in self._stored(self._rows, k).items()}
        del self._rows[k]
        shift = self._drafter.shift(k, self._drafts.pop(k), x) if self._gain else None
        if shift is not None:
            for branch in outputs_as_branches([outputs[name] for name in self._final], x) or ():
                branch.copy_(branch + self._gain * shift)
        return outputs

    def agrees(self, on_all: bool = False) -> bool:
        """Return whether the parts of the program together reproduce the results of the traced step.

        on_all: have all devices evaluate it at once.
        """
        like = {name: varying.like for name, varying in self._learned.inputs.items()}
        drafts = self._session.arena.bind.slots // self._program.parts if on_all else 1
        rows = self._evaluate([(self._first + i, 0.0, like) for i in range(drafts)])
        return all(self._as_recorded(rows, k) for k in rows)

    def _as_recorded(self, rows: Mapping[int, list[int]], k: int) -> bool:
        """Return whether the results at an index are those of the traced step, up to rounding."""
        for name, made in self._stored(rows, k).items():
            wanted = self._learned.outputs[name].double()
            few = 1e-4 if torch.finfo(made.dtype).bits >= 32 else 0.05
            if not float((made.double() - wanted).norm()) <= few * float(wanted.norm()):
                return False
        return True

    def agrees_stacked(self, count: int) -> bool:
        """Return whether a draft that is stacked with others reproduces the results of the traced step.

        The others have negated latents, to detect samples of a batch that depend on each other.
        """
        like = {name: varying.like for name, varying in self._learned.inputs.items()}
        forms = {name: varying.form for name, varying in self._learned.inputs.items()}
        other = {name: -value if isinstance(forms[name], OfState) else value for name, value in like.items()}
        rows = self._evaluate([(self._first + i, 0.0, other if i else like) for i in range(count)])
        return self._as_recorded(rows, self._first)

    def close(self) -> None:
        self._report_incidents()
        self._session.close()

    def _report_incidents(self) -> None:
        """Report the workers that were lost since the last call."""
        new = self._session.incidents[self._reported :]
        self._report.notes.update(new)
        self._reported += len(new)

    def _begin(self, k: int) -> None:
        """Restart the rounds at step k, as in a run that starts there."""
        self._first = self._drafter.base = self._drafter.previous_base = k
        steps = self._end - k
        try:
            mode = self._mode.for_steps(steps)
        except ValueError as error:  # The mode cannot take this number of steps.
            raise UnrecognisedError(str(error), final=True) from None
        self._drafter.rule = mode.rule
        self._rounds: Rounds = mode.rounds(steps)
        self._rows, self._drafts, self._residuals = {}, {}, None
        self._next = self._after()

    def _after(self) -> Round | None:
        """Return the next round, None at the end or if it depends on the residuals of this one."""
        if self._residuals is not None:
            return None
        try:
            return next(self._rounds, None)
        except ValueError as error:  # The mode, a user's, cannot take this number of steps.
            raise UnrecognisedError(str(error), final=True) from None

    def _due(self, k: int, x: Tensor, stepped: Tensor | None) -> bool:
        """Return whether a round must be evaluated before step k, from the state x there."""
        if k not in self._rows:
            return True
        residual = _apart(x, self._drafts[k])
        self._report.residuals[k] = residual
        if stepped is not None and _apart(x, stepped) > JUMP:
            self._report.notes["drafts were given up: the latents were replaced between two steps"] += 1
            self._jumps += 1
            if self._jumps > MOST_JUMPS:
                raise UnrecognisedError("the latents are replaced between steps repeatedly", final=True)
            self._begin(k)
            return True
        if self._residuals is not None:
            self._residuals.append(residual)
        if self._adaptive is not None and not residual <= self._adaptive.tolerance:
            self._report.notes["drafts were given up as stale"] += 1
            return True
        return self._next is not None and self._next.predict[0] + self._first == k

    def _round(self, k: int, x: Tensor, inputs: Mapping[str, Tensor]) -> None:
        """Make and evaluate the drafts of the next round, refined with the predictions from k on that there are."""
        r = self._next
        if r is None and self._residuals is not None:
            try:
                r = self._rounds.send(self._residuals)  # of the drafts of the previous round, from its base on
            except StopIteration:
                r = None
        if r is None:
            raise UnrecognisedError("the pipeline takes more steps than its scheduler has timesteps")
        self._drafter.advance(r.base + self._first)
        last = r.predict[-1] + self._first
        assert r.predict[0] + self._first == k, "parallelize refuses modes that do not go on step by step"
        kept = dict(self._drafts)
        drafts = []
        for state in self._drafter.states(k, last, x, lambda i, at: self._kept(i, at, kept)):
            point = Point(state.x, state.scale, self._drafter.numbers(state.index))
            varying = self._learned.inputs
            drafted = inputs if state.index == k else {name: v.at(point) for name, v in varying.items()}
            drafts.append((state.index, float(self._drafter.timesteps[state.index]), drafted))
            self._drafts[state.index] = state.x
        spent = self._session.device_seconds
        self._rows = self._evaluate(drafts)
        self._report.device_seconds += self._session.device_seconds - spent
        self._report_incidents()
        self._residuals = [0.0] if self._mode.feedback else None
        self._next = self._after()
        self._report.rounds += 1
        self._report.evaluations += len(drafts)

    def _kept(self, i: int, x: Tensor, drafts: Mapping[int, Tensor]) -> Tensor | None:
        """Return the output after guidance in state x by the prediction at index i."""
        if i not in self._rows or self._weights is None:
            return None
        results = self._stored(self._rows, i)
        branches = outputs_as_branches([results[name] for name in self._final], x)
        if branches is None:
            return None
        working = torch.promote_types(x.dtype, torch.float32)
        output = sum(w * branch.to(working) for w, branch in zip(self._weights, branches, strict=True))
        assert isinstance(output, Tensor)
        shift = self._drafter.shift(i, drafts[i], x) if self._gain else None
        return (output if shift is None else output + shift).to(branches[0].dtype)

    def _evaluate(self, drafts: Sequence[tuple[int, float, Mapping[str, Tensor]]]) -> dict[int, list[int]]:
        """Run the program on drafts, given index, timestep and arguments; return the rows of the results' parts."""
        parts = self._program.parts
        tasks: list[Task] = []
        for index, t, inputs in drafts:
            for part in range(parts):
                slot = len(tasks)
                draft = self._session.arena.draft(slot)
                for name, value in inputs.items():
                    draft[name].copy_(value)
                if parts > 1:
                    draft[PART].fill_(part)
                tasks.append(Task(index * parts + part, t, slot))
        rows = self._session.evaluate(tasks)
        return {index: [rows[index * parts + part] for part in range(parts)] for index, *_ in drafts}

    def _stored(self, rows: Mapping[int, list[int]], k: int) -> dict[str, Tensor]:
        """Return the results at an index, joined from their parts, on the pipeline's device."""
        merged = self._program.merge([self._session.arena.prediction(row) for row in rows[k]])
        return {name: tensor.to(self._learned.outputs[name].device) for name, tensor in merged.items()}


def _final_results(learned: Learned) -> list[str]:
    """Return the names of the results that are not arguments of a later call: guidance combines these."""
    taken = {leaf.call for call in learned.program.calls for leaf in call.leaves if leaf.kind == "output"}
    return [
        output_name(number, place)
        for number, (_, tensors) in enumerate(learned.results)
        if number not in taken
        for place in range(len(tensors))
    ]


def _apart(x: Tensor, draft: Tensor) -> float:
    """Return the largest |x - draft| / |x| among the samples."""
    if x.device.type != "cpu":
        norms = [torch.linalg.vector_norm(each.flatten(1), dim=1, dtype=torch.float64) for each in (x - draft, x)]
        return float((norms[0] / norms[1]).max())
    return residual(x.reshape(-1), draft.reshape(-1), len(x))


def _adaptive(mode: Mode) -> Adaptive | None:
    """Return the adaptive mode inside a mode, None if there is none."""
    while not isinstance(mode, Adaptive):
        if not hasattr(mode, "mode"):
            return None
        mode = mode.mode
    return mode
