"""When do workers on other machines pay? `python -m bench.links`: simulated runs over links, as a table and a picture.

Eight devices, 48 steps, aggressive, encrypted by CURVE: the speed-up over one device on the leader's machine, by the
time of an evaluation, the size of a draft and the link.
"""

from __future__ import annotations

from pathlib import Path

import click

from drp.leader.devices import parse_bytes, parse_time
from drp.leader.scheduling.policies import LoadAdaptive
from drp.sampling.modes import Aggressive
from drp.simulate import Costs, Link, Workload, make_devices, simulate

DEVICES, STEPS = 8, 48
CURVE = "730MB/s"
"""What a core encrypts or decrypts by CURVE."""
TIMES = ("20ms", "50ms", "100ms", "200ms", "500ms", "1s")
SIZES = ("64KiB", "256KiB", "1MiB", "8MiB")
LINKS = {"10 Gbit/s, 100 us": "100us@1.25GB/s", "1 Gbit/s, 200 us": "200us@125MB/s", "10 Gbit/s, 5 ms": "5ms@1.25GB/s"}
MESSAGE, ROW, WAKE = 50e-6, 10e-6, 100e-6


def speedup(time: str, size: str | None, link: str) -> float:
    """Return the speed-up over one device; without a size, of workers on the leader's machine."""
    costs, load = Costs.constant(MESSAGE, ROW, WAKE), Workload(Aggressive(DEVICES), STEPS, 1)
    network = Link.parse(link, CURVE, parse_bytes(size)) if size is not None else None
    devices = make_devices(f"{DEVICES}xemulated:{time}")
    return STEPS * parse_time(time) / simulate(devices, LoadAdaptive(), load, costs, link=network).median


def markdown(link: str) -> str:
    """Return the table of a link."""
    lines = [f"| an evaluation | one machine | {' | '.join(SIZES)} |", "|---" * (2 + len(SIZES)) + "|"]
    for time in TIMES:
        cells = [speedup(time, size, link) for size in (None, *SIZES)]
        lines.append(f"| {time} | {' | '.join(f'{cell:.1f}' for cell in cells)} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """Draw a plot for each link: the speed-up by the time of an evaluation, a line for each size."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(LINKS), figsize=(12, 4), sharey=True, layout="constrained")
    for axis, (name, link) in zip(axes, LINKS.items(), strict=True):
        seconds = [parse_time(time) for time in TIMES]
        axis.plot(seconds, [speedup(time, None, link) for time in TIMES], "k--", label="one machine")
        for size in SIZES:
            axis.plot(seconds, [speedup(time, size, link) for time in TIMES], "o-", label=size)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set(title=f"{name}, CURVE", xscale="log", xlabel="time of an evaluation, s")
        axis.set_xticks(seconds, TIMES, rotation=45)
        axis.minorticks_off()
    axes[0].set_ylabel(f"speed-up on {DEVICES} devices (simulated)")
    axes[0].legend(title="a draft")
    figure.savefig(path, dpi=110)


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("docs/several-machines.png"))
def main(out: Path) -> None:
    """Print the tables, and draw the picture."""
    for name, link in LINKS.items():
        click.echo(f"{name}:\n\n{markdown(link)}\n")
    draw(out)


if __name__ == "__main__":
    main()
