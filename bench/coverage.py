"""Coverage: every pipeline class of diffusers that a small configuration is known for, with one draft and with three.

python -m bench.coverage [NAMES] prints whether one draft a round has the bits of the untouched pipeline, and whether
three are drafted, or what is in the way; with --write it puts the rows into the table of docs/pipeline-classes.md,
where those of other classes stay. It ends with 1 if anything is wrong, crashes or takes too long. Drafts are
evaluated in this process.
"""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from dataclasses import dataclass

import diffusers
import torch

from bench.tables import update
from drp.diffusers import reference
from tests.pipelines import run
from tests.tiny import flux, image_transformers, sound, stable_diffusion, unets, videos

STEPS = 7
CASES = {
    **stable_diffusion.CASES,
    **flux.CASES,
    **image_transformers.CASES,
    **unets.CASES,
    **videos.CASES,
    **sound.CASES,
}
LIMIT = 120
"""Seconds that a class may take."""
HEAD = "| pipeline | one draft is exact | three drafts | why |"


@dataclass(frozen=True)
class Row:
    """What was seen of a class: `exact` says of one draft, `steps` and `rounds` of three, `why` what is in the way."""

    name: str
    exact: bool
    steps: int
    rounds: int
    why: str

    def __str__(self) -> str:
        """Return the row of the table."""
        drafted = "sequential" if self.rounds == self.steps else f"{self.steps} steps in {self.rounds} rounds"
        return f"| {short(self.name)} | {'yes' if self.exact else '**no**'} | {drafted} | {self.why} |"


def short(name: str) -> str:
    """Return a class's name as the table has it."""
    return name.replace("Pipeline", "")


def look_at(name: str) -> Row:
    """Run a class untouched, with one draft a round, and with three."""
    case = CASES[name]
    pipe = case.make(name)
    untouched = run(pipe, case.options, STEPS)
    try:
        with reference(pipe):
            exact = torch.equal(run(pipe, case.options, STEPS), untouched)
        with reference(pipe, devices=3, mode="aggressive") as parallel:
            drafted = run(pipe, case.options, STEPS)
    except ValueError as error:
        return Row(name, True, 0, 0, f"refused: {error}")
    report = parallel.report.calls[-1]
    if report.sequential:
        exact = exact and torch.equal(drafted, untouched)
    return Row(name, exact, report.steps, report.rounds, report.reason or "; ".join(report.notes))


def _too_long(*_: object) -> None:
    raise TimeoutError(f"it took more than {LIMIT} s")


def main() -> None:
    """Print the table, and perhaps put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names of classes (all)")
    parser.add_argument("--write", action="store_true", help="put the rows into docs/pipeline-classes.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_long)
    rows: dict[str, str] = {}
    wrong = False
    for name in CASES:
        if options.names and not any(part in name for part in options.names):
            continue
        signal.alarm(LIMIT)
        try:
            row = look_at(name)
        except Exception as error:  # the others are of interest all the same
            row = Row(name, False, 0, 0, f"raised {type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
        wrong |= not row.exact
        rows[short(name)] = str(row)
        print(row, flush=True)
    if options.write:
        update("pipeline classes", HEAD, rows, [short(name) for name in CASES])
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
