"""The paper's evaluation (DRiffusion, arXiv 2603.25872): its modes with its drafts, and ours, on a prompt list.

    python -m bench.paper --pipeline PATH --captions coco.txt --reference-stats fid.npz --devices 4
    python -m bench.paper --pipeline digits --count 200 --devices 2

Sequential, conservative and aggressive with the paper's drafts for n = 2, 3 and 4, and the default window; caption i
has seed i. With `digits` the features of its classifier stand in for Inception's, the sequential samples for the
reference images of FID, and the share of samples that are read as asked for CLIP: figures of digits say nothing of text
to image. `--write` puts their rounds and metrics into docs/compare.md. Metrics whose package or weights are missing are
left out, and named.
"""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from bench.paper_metrics import Frechet, Metric, Score, make_metrics
from bench.tables import update
from drp.comparison.models import ModelSubject
from drp.comparison.settings import Drafted
from drp.comparison.subject import Sample
from drp.leader import LeaderOptions
from drp.pipelines import load_pipeline
from training.classifier import load_classifier

NUMBERS = (2, 3, 4)
PAGE = Path(__file__).parent.parent / "docs" / "compare.md"
PAPER = "1.4 to 3.7 times as fast; FID and CLIP on par; PickScore 0.17 and HPSv2.1 0.43 lower on average"
"""What the paper's abstract reports, on MS-COCO and up to four GPUs."""

Sampler = Callable[[int], Sample]
"""Returns sample i."""


def settings() -> list[Drafted]:
    """Return the paper's settings, and ours."""
    papers = [Drafted(mode, n, rule="paper") for mode in ("conservative", "aggressive") for n in NUMBERS]
    return [*papers, *(Drafted("window", n) for n in NUMBERS)]


@dataclass(frozen=True)
class Row:
    """A setting's figures: rounds, seconds a sample, times as fast as the sequential run, and the metrics."""

    label: str
    rounds: float
    seconds: float
    speedup: float
    metrics: dict[str, float]


def evaluate(
    label: str, sample: Sampler, count: int, captions: Sequence[str], metrics: Sequence[Metric], base: float | None
) -> Row:
    """Sample all captions; `base` are the seconds of a sequential sample, None if this is it."""
    rounds, seconds = [], []
    for i in range(count):
        made = sample(i)
        rounds.append(made.rounds)
        seconds.append(made.seconds)
        if made.images is None:
            raise ValueError("the samples are no pictures")
        for metric in metrics:
            metric.add(made.images[0], captions[i])
    usual = statistics.median(seconds)
    figures = {metric.name: metric.result() for metric in metrics}
    return Row(label, statistics.fmean(rounds), usual, (base or usual) / usual, figures)


def table(rows: Sequence[Row]) -> str:
    """Return the rows with the differences from the first, the sequential run, as Markdown."""
    names = list(rows[0].metrics)
    heads = ["setting", "rounds", "s a sample", "times as fast", *(f"{name} (difference)" for name in names)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        figures = [f"{row.metrics[n]:.3f} ({row.metrics[n] - rows[0].metrics[n]:+.3f})" for n in names]
        cells = [row.label, f"{row.rounds:.4g}", f"{row.seconds:.3f}", f"{row.speedup:.2f}", *figures]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(rows: Sequence[Row], count: int, page: Path = PAGE) -> None:
    """Put rounds and metrics into a page; times of digits are those of two cores, and left out."""
    names = list(rows[0].metrics)
    head = f"| {count} samples of digits | rounds | {' | '.join(names)} |"
    lines = {}
    for row in rows:
        figures = [f"{round(row.metrics[name], 3) + 0.0:.3f}" for name in names]  # + 0.0: no negative zero
        lines[row.label] = f"| {row.label} | {row.rounds:.4g} | {' | '.join(figures)} |"
    update("paper", head, lines, lines, page)


@contextmanager
def digits(devices: str, steps: int) -> Iterator[Callable[[Drafted | None], Sampler]]:
    """Yield what makes a sampler of `digits` for a setting, None for the sequential run."""
    with ModelSubject("digits", LeaderOptions(devices=devices), steps=steps) as subject:
        yield lambda setting: functools.cache(lambda i: subject.run(setting, i))


def digits_metrics(sample: Sampler, count: int) -> list[Metric]:
    """Return the stand-ins for FID and CLIP: the reference are the sequential samples."""
    classifier = load_classifier()

    def to_input(images: Tensor) -> Tensor:
        return images.float() / 127.5 - 1

    def features(images: Tensor) -> Tensor:
        return classifier.features(to_input(images))

    def read(image: Tensor, caption: str) -> float:
        return float(classifier(to_input(image[None])).argmax() == int(caption))

    made = [sample(i).images for i in range(count)]
    found = torch.cat([features(images) for images in made if images is not None]).double()
    frechet = Frechet(features, found.mean(0), torch.cov(found.T), "Frechet, classifier")
    return [frechet, Score("read as asked", read)]


@contextmanager
def pipeline(
    path: str, devices: str, captions: Sequence[str], steps: int | None
) -> Iterator[Callable[[Drafted | None], Sampler]]:
    """Yield what makes a sampler of a pipeline for a setting, None for the sequential run."""
    from drp.diffusers.comparison import PipelineSubject

    try:
        pipe = load_pipeline(path)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    more: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
    with PipelineSubject(pipe, {"prompt": captions[0], **more}, devices) as subject, ExitStack() as stack:

        def sampler(setting: Drafted | None) -> Sampler:
            stack.close()
            if setting is None:
                return lambda i: subject.sample(i, prompt=captions[i])
            session = stack.enter_context(subject.session(setting))
            return lambda i: session.sample(i, prompt=captions[i])

        yield sampler


@click.command()
@click.option("--pipeline", "path", required=True, help="digits, a folder, a hub's name or package.module:factory.")
@click.option("--captions", type=click.Path(exists=True, path_type=Path), help="A caption in each line.")
@click.option("--count", type=click.IntRange(2), help="How many samples; by default one for each caption.")
@click.option("--reference-stats", type=click.Path(exists=True, path_type=Path), help="mu and sigma of FID's images.")
@click.option("--metrics", default="fid,clip,pickscore,hpsv2", show_default=True)
@click.option("--clip", default="openai/clip-vit-large-patch14", show_default=True, help="Model of the CLIP score.")
@click.option("--pickscore", default="yuvalkirstain/PickScore_v1", show_default=True, help="Model of PickScore.")
@click.option("--steps", type=click.IntRange(2), help="By default a pipeline's own, and 48 of digits.")
@click.option("--devices", default="2", show_default=True)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="JSON.")
@click.option("--write", is_flag=True, help="Put rounds and metrics of digits into the table of docs/compare.md.")
def main(
    path: str,
    captions: Path | None,
    count: int | None,
    reference_stats: Path | None,
    metrics: str,
    clip: str,
    pickscore: str,
    steps: int | None,
    devices: str,
    out: Path | None,
    write: bool,
) -> None:
    """Print the paper's table for a pipeline."""
    if write and path != "digits":
        raise click.UsageError("--write goes with --pipeline digits")
    if path == "digits":
        number = count or 200
        texts = [str(i % 10) for i in range(number)]
        opened = digits(devices, steps or 48)
    elif captions is None:
        raise click.UsageError("a pipeline needs --captions")
    else:
        texts = captions.read_text().splitlines()
        number = min(count or len(texts), len(texts))
        opened = pipeline(path, devices, texts, steps)
    with opened as samplers:
        missing: dict[str, str] = {}
        sequential = samplers(None)
        if path == "digits":
            chosen: list[Metric] = digits_metrics(sequential, number)
        else:
            chosen, missing = make_metrics(metrics.split(","), reference_stats, {"clip": clip, "pickscore": pickscore})
        rows = [evaluate("sequential", sequential, number, texts, chosen, None)]
        for setting in settings():
            rows.append(evaluate(setting.label, samplers(setting), number, texts, chosen, rows[0].seconds))
            click.echo(f"{setting.label}: done", err=True)
    click.echo(table(rows))
    click.echo(f"\nThe paper, on average over its models: {PAPER}.")
    for name, reason in missing.items():
        click.echo(f"Left out: {name}, because {reason}.")
    if path == "digits":
        click.echo("The classifier's features and its reading stand in for Inception and CLIP.")
    if write:
        write_table(rows, number)
    if out is not None:
        out.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
