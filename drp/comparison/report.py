"""The reports: report.html, one file that needs no network, and report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, median
from typing import Any

import jinja2

from drp.comparison.charts import HEIGHT, LEFT, TOP, WIDTH, plot, timeline
from drp.comparison.choose import DEFAULT_DISTANCE, Recommendation, choose, speedup
from drp.comparison.contact_sheet import contact_sheet
from drp.comparison.store import UNTOUCHED, Store
from drp.leader.devices import parse_emulated
from drp.trace import read
from drp.trace.evaluations import evaluations

BUSY = 1.5
"""How many times its shortest time an untouched call may take before the report says that times vary."""

SLOW_EMULATION = 1.1
"""The report has a note if the median evaluation of an emulated device takes more than this multiple of its time."""


def write_reports(
    store: Store, seeds: Sequence[int], planned: int, max_distance: float | None, min_speedup: float | None
) -> Recommendation:
    """Write both reports and the recommendation; `planned` is how many settings there are to be."""
    cells: dict[str, dict[str, Any]] = store.results["cells"]
    chosen = choose(cells, max_distance, min_speedup)
    store.results["recommendation"] = {**asdict(chosen), "max_distance": max_distance, "min_speedup": min_speedup}
    store.write()
    bound = DEFAULT_DISTANCE if max_distance is None and min_speedup is None else max_distance
    shown = chosen.key or next((key for key, cell in cells.items() if cell["kind"] == "drafted"), None)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("drp.comparison", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    heads, *rows = table(store)
    untouched = store.results.get(UNTOUCHED)
    page = environment.get_template("report.html.j2").render(
        facts=store.results["facts"],
        machine=store.results.get("machine", {}),
        untouched=untouched,
        untouched_seconds=median(untouched["seconds"]) if untouched else None,
        missing=planned - len(cells),
        heads=heads,
        rows=rows,
        chosen=chosen,
        chosen_label=cells[chosen.key]["label"] if chosen.key else None,
        plot=plot(list(cells.values()), bound) if cells else None,
        size=(WIDTH, HEIGHT, LEFT, TOP),
        sheet=contact_sheet(store, seeds) if untouched else None,
        timeline=timeline(cells[shown]["label"], store.samples(shown) / "trace.json") if shown else None,
        notes=notes(store),
    )
    (store.folder / "report.html").write_text(page)
    (store.folder / "report.md").write_text(markdown(store, chosen, planned))
    return chosen


def table(store: Store) -> list[list[str]]:
    """Return the titles of the table's columns, and a row for each setting."""
    measures = store.results.get("measures", {})
    fixed = ["#", "setting", "times as fast", "relative L2, mean", "largest", "rounds", "evaluations", "seconds"]
    rows = [row(number, cell, measures) for number, cell in enumerate(store.results["cells"].values(), start=1)]
    return [[*fixed, *(measure["title"] for measure in measures.values())], *rows]


def row(number: int, cell: Mapping[str, Any], measures: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return a setting's row of the table."""
    l2 = cell["distances"]["relative_l2"]
    figures = [
        str(number),
        cell["label"],
        f"{speedup(cell):.2f}",
        f"{l2['mean']:.4f}",
        f"{l2['max']:.4f}",
        f"{fmean(cell['rounds']):.4g}",
        f"{fmean(cell['evaluations']):.4g}",
        f"{median(cell['seconds']):.3f}",
    ]
    for name, measure in measures.items():
        value = cell["distances"][name][measure["summary"]]
        finite = value is not None and value != float("inf")
        figures.append((f"{value:.1f}" if name == "psnr" else f"{value:.4f}") if finite else "identical")
    return figures


def notes(store: Store) -> list[str]:
    """Return the notes that a reader needs in addition to the figures."""
    found = [f"Left out: {name}, because {reason}." for name, reason in store.results.get("omitted", {}).items()]
    cells = list(store.results["cells"].values())
    for cell in cells:
        if cell["reason"]:
            found.append(f"{cell['label']} was not drafted: {cell['reason']}.")
    repeats = max((cell["untouched_repeats"] for cell in cells), default=0.0)
    if repeats > 0:
        found.append(
            f"The untouched run does not repeat itself exactly: two runs of one seed lie up to {repeats:.2g} apart."
        )
    seconds = [each for cell in cells for each in cell["untouched_seconds"]]
    if seconds and max(seconds) > BUSY * min(seconds):
        found.append(
            f"The untouched run took {min(seconds):.3g} to {max(seconds):.3g} s: other programs ran, or the clock "
            "rate changed. Measure the times again on a quiet machine."
        )
    found += slow_emulation(store)
    if any(cell["kind"] != "drafted" for cell in cells):
        found.append(
            "Distances are to the untouched run. A better solver with fewer steps may be nearer to the exact solution "
            "than the untouched run is, and still lie far from it."
        )
    return found


def slow_emulation(store: Store) -> list[str]:
    """Say by how much evaluations took longer than the emulated devices' own time, if they did."""
    names = store.results["facts"]["devices"]
    nominal = {n: parse_emulated(name, n).seconds for n, name in enumerate(names) if name.startswith("emulated:")}
    if not nominal:
        return []
    slowest = 0.0
    for key, cell in store.results["cells"].items():
        trace = store.samples(key) / "trace.json"
        if cell["kind"] == "drafted" and trace.exists():
            events, _, _ = read(trace)
            shares = [e.seconds / nominal[e.worker] for e in evaluations(events) if e.answered and e.worker in nominal]
            slowest = max(slowest, median(shares or [0.0]))
    if slowest <= SLOW_EMULATION:
        return []
    return [
        f"The emulated devices took up to {slowest:.2f} times their time for an evaluation, since the cores of this "
        "machine cannot evaluate the model on so many at once: real devices are faster than these times say. drp tune "
        "measures emulated devices without the model."
    ]


def _in_words(value: Any) -> str:
    """Return a fact of a comparison as text, empty for an option that is at its default."""
    if isinstance(value, Mapping):
        texts = {name: _in_words(each) for name, each in value.items()}
        return ", ".join(f"{name} {text}" for name, text in texts.items() if text)
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    return "" if value is None or value is False or value == "auto" else str(value)


def markdown(store: Store, chosen: Recommendation, planned: int) -> str:
    """Return report.md."""
    facts, untouched = store.results["facts"], store.results.get(UNTOUCHED)
    titles, *rows = table(store)
    lines = ["# Drafting compared with the untouched run", ""]
    texts = {name.replace("_", " "): _in_words(value) for name, value in facts.items()}
    lines += [f"- {name}: {text}" for name, text in texts.items() if text]
    if untouched:
        lines.append(f"- untouched: {untouched['baseline']}, {median(untouched['seconds']):.3f} s a call")
    if len(rows) < planned:
        lines.append(f"- interrupted: {len(rows)} of {planned} settings are measured; the same command goes on")
    lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    lines += [f"| {' | '.join(each)} |" for each in rows]
    lines += ["", *(f"- {note}" for note in notes(store)), "", chosen.text]
    if chosen.code:
        lines += ["", "```python", chosen.code, "```"]
    return "\n".join(lines) + "\n"
