"""How long a study will take, and how many steps a time pays for: a few real steps of each variant, timed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipvisionalign.data.batches import steps_in_epoch
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.progress import long_step
from clipvisionalign.study.plan import Cell, Plan
from clipvisionalign.study.significant import significant
from clipvisionalign.training.config import RunConfig, check_settings
from clipvisionalign.training.fine_tuning import IMAGE_FROZEN
from clipvisionalign.training.train import train

Say = Callable[[str], None]

#: Steps that are timed, after those that warm up.
STEPS = 4
IMAGES, CAPTIONS = 16, 64


@dataclass(frozen=True)
class Probe:
    """What was timed of one variant, in seconds."""

    step: float
    image: float
    caption: float


def probe(config: RunConfig, part: CaptionedImages) -> Probe:
    """Time a few steps of a training, and the encoding of a few pictures and captions of `part`."""
    check_settings(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        short = replace(
            config, out=str(folder / "run"), init="", cache=str(folder / "cache"), views=1, epochs=1, steps=0,
            train_images=(STEPS + 1) * config.batch, profile=STEPS, trackers="",
        )  # fmt: skip
        found = train(short, _nothing)
    aligner = Aligner(config.model, load_weights=False).eval()
    images, captions = part.images[:IMAGES], part.captions[:CAPTIONS]
    return Probe(
        sum(found["profile"].values()) / found["steps"],
        _seconds(lambda: aligner.encode_images(images)) / len(images),
        _seconds(lambda: aligner.encode_captions(captions)) / len(captions),
    )


def _nothing(line: str) -> None:
    """A probe says nothing."""


def _seconds(work: Callable[[], Any]) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def steps_for(seconds: float, probed: Probe) -> int:
    """Steps that so many seconds of training pay for, one at least."""
    return max(1, round(seconds / probed.step))


def estimated(
    plan: Plan, cells: list[Cell], probes: dict[str, Probe], train_images: int, part: CaptionedImages
) -> dict[str, float]:
    """Seconds by what they go into. Encoding is counted as often as the study does it; a frozen picture tower looks at
    every picture once for all cells."""
    first = cells[0].config
    number = min(train_images, first.train_images or train_images)
    frozen = first.freeze in IMAGE_FROZEN
    views = 1 if first.augment == "none" else first.views
    found = {"features of the frozen picture tower": 0.0, "training": 0.0, "dev figures, audits, minimal pairs": 0.0}
    if frozen:
        found["features of the frozen picture tower"] = probes[cells[0].variant].image * (number * views + len(part))
    captions = len(part.captions)
    for cell in cells:
        timed, config = probes[cell.variant], cell.config
        each = steps_in_epoch(number, config.batch)
        steps = config.steps or each * config.epochs
        found["training"] += steps * timed.step
        looks = -(-steps // each) + 2
        seconds = looks * captions * timed.caption + len(part) * timed.image * (1 if frozen else looks)
        pairs = sum((4 * plan.measure.composition, 200)) if plan.measure.composition else 200
        found["dev figures, audits, minimal pairs"] += seconds + pairs * (timed.caption * 2 + timed.image)
    found["time and memory"] = plan.measure.rounds * len(plan.variants) * 20.0
    return found


def probes_of(cells: list[Cell], part: CaptionedImages, say: Say) -> dict[str, Probe]:
    """A probe of each variant."""
    found = {}
    for cell in cells:
        if cell.variant not in found:
            with long_step(f"timing some steps of {cell.variant}"):
                found[cell.variant] = probe(cell.config, part)
            step = found[cell.variant].step
            say(f"{cell.variant}: {format(step, significant(step))} s a step")
    return found
