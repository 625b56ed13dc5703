"""`python -m bench --devices 8`: ask all questions in turn; tables on screen, JSON and a picture in bench/results."""

from __future__ import annotations

import datetime
import itertools
import json
import time
from pathlib import Path
from typing import Any

import click
import torch

from bench import client_overhead, interleaved, plot, real_model, side_by_side, speedup
from bench import figures as facts
from bench.transports.base import Work

RESULTS = Path(__file__).with_name("results")
DEVICES = {"emulated:20ms": 4, "emulated:5ms": 8}
"""With how many turns each is measured."""


@click.command()
@click.option("-d", "--devices", default=8, show_default=True, help="Emulated devices.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="JSON; a picture is written beside it.")
def main(devices: int, out: Path | None) -> None:
    """Measure drp on this machine."""
    torch.set_num_threads(1)
    console, began = facts.console(), time.perf_counter()
    figures: dict[str, Any] = {
        "machine": facts.machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(),
    }
    console.print_json(data=figures["machine"])

    figures["speedup"] = {}
    for (device, turns), dispatch in itertools.product(DEVICES.items(), speedup.DISPATCHES):
        found = speedup.measure(device, devices, dispatch, turns)
        figures["speedup"][f"{device}, ordered by the {dispatch}"] = found
        console.print(*speedup.tables(found))

    work = Work(next(iter(DEVICES)), devices)
    figures["side_by_side"] = {"device": f"{devices} x {work.device}", "transports": side_by_side.measure(work)}
    console.print(side_by_side.table(figures["side_by_side"]["transports"], work))

    figures["interleaved"] = interleaved.measure()
    console.print(interleaved.table(figures["interleaved"]))

    figures["client_overhead"] = client_overhead.measure()
    console.print(client_overhead.table(figures["client_overhead"]))
    figures["real_model"] = real_model.measure()
    console.print(real_model.table(figures["real_model"]))
    gpus = torch.cuda.device_count()
    figures["real_gpus"] = f"{gpus}, not measured here: python -m bench.gpu does" if gpus else "none"
    console.print("real GPUs:", figures["real_gpus"])

    figures["seconds"] = time.perf_counter() - began
    out = out or RESULTS / f"emulated-{devices}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n")
    if plot.available():
        plot.draw(figures, out.with_suffix(".png"))
    else:
        console.print("no picture: matplotlib is missing; pip install 'drp\\[plots]'")
    console.print(f"{figures['seconds']:.0f} s in all; wrote {out}")


if __name__ == "__main__":
    main()
