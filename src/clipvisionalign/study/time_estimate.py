"""Estimates the duration of a study, and the steps of a budget, from a few timed steps of each variant."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipvisionalign.data.batches import steps_in_epoch
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.log import log_to
from clipvisionalign.models.aligner import Aligner
from clipvisionalign.number_format import significant_format
from clipvisionalign.progress import progress_step
from clipvisionalign.study.config import Plan, Trial
from clipvisionalign.training.config import RunConfig, caches_image_features
from clipvisionalign.training.config_checks import check_settings
from clipvisionalign.training.fine_tuning import IMAGE_FROZEN
from clipvisionalign.training.run_stage import stage_settings
from clipvisionalign.training.stages import total_epochs
from clipvisionalign.training.train import train

logger = logging.getLogger(__name__)

#: Steps that are timed, after those that warm up.
TIMED_STEPS = 4
TIMED_IMAGES, TIMED_CAPTIONS = 16, 64


@dataclass(frozen=True)
class StepTiming:
    """What was timed of one variant.

    Attributes:
        seconds_per_step: Of training.
        seconds_per_image: Of encoding.
        seconds_per_caption: Of encoding.
    """

    seconds_per_step: float
    seconds_per_image: float
    seconds_per_caption: float


def time_steps(config: RunConfig, eval_data: CaptionedImages) -> StepTiming:
    """Time a few steps of a training, and the encoding of a few images and captions.

    Args:
        config: The settings of the training.
        eval_data: The images and captions that are encoded.

    Returns:
        Seconds of each.
    """
    check_settings(config)
    # Its last stage, which trains most as a rule.
    config = stage_settings(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = "off" if config.cache == "off" else str(folder / "cache")
        short_config = replace(
            config, out=str(folder / "run"), init="", cache=cache, views=1, epochs=1, steps=0,
            distill=0.0, train_images=(TIMED_STEPS + 1) * config.batch, profile=TIMED_STEPS, trackers="",
        )  # fmt: skip
        with log_to(_ignore):
            profile = train(short_config)
    aligner = Aligner(config.model, load_weights=False).eval()
    images, captions = eval_data.images[:TIMED_IMAGES], eval_data.captions[:TIMED_CAPTIONS]
    return StepTiming(
        sum(profile["profile"].values()) / profile["steps"],
        _seconds(lambda: aligner.encode_images(images)) / len(images),
        _seconds(lambda: aligner.encode_captions(captions)) / len(captions),
    )


def _ignore(line: str) -> None:
    """A probe prints nothing."""


def _seconds(work: Callable[[], Any]) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def steps_in_time(seconds: float, timing: StepTiming) -> int:
    """Steps that a time of training pays for.

    Args:
        seconds: The time.
        timing: What was timed.

    Returns:
        The number, one at least.
    """
    return max(1, round(seconds / timing.seconds_per_step))


def estimate_seconds(
    plan: Plan, trials: list[Trial], timings: dict[str, StepTiming], train_images: int, eval_data: CaptionedImages
) -> dict[str, float]:
    """Seconds by what they go into.

    Encoding is counted as often as the study does it; a frozen image tower looks at every image once for all cells.

    Args:
        plan: The plan.
        trials: The trials that are to be trained.
        timings: By variant.
        train_images: Number of training images.
        eval_data: The split that is measured.

    Returns:
        Seconds by what they go into.
    """
    first_config = trials[0].config
    train_image_count = min(train_images, first_config.train_images or train_images)
    frozen = first_config.freeze in IMAGE_FROZEN
    kept = caches_image_features(first_config)
    views = 1 if first_config.augment == "none" else first_config.views
    seconds_by_phase = {
        "features of the frozen image tower": 0.0,
        "training": 0.0,
        "dev figures, audits, minimal pairs": 0.0,
    }
    if kept:
        seconds_by_phase["features of the frozen image tower"] = timings[trials[0].variant].seconds_per_image * (
            train_image_count * views + len(eval_data)
        )
    captions = len(eval_data.captions)
    for trial in trials:
        timing, config = timings[trial.variant], trial.config
        steps_per_epoch = steps_in_epoch(train_image_count, config.batch)
        steps = config.steps or steps_per_epoch * total_epochs(config.stages, config.epochs)
        seconds_by_phase["training"] += steps * timing.seconds_per_step
        evaluations = -(-steps // steps_per_epoch) + 2
        seconds = evaluations * captions * timing.seconds_per_caption + len(eval_data) * timing.seconds_per_image * (
            1 if frozen else evaluations
        )
        pairs = sum((4 * plan.measure.composition, 200)) if plan.measure.composition else 200
        seconds_by_phase["dev figures, audits, minimal pairs"] += seconds + pairs * (
            timing.seconds_per_caption * 2 + timing.seconds_per_image
        )
    seconds_by_phase["time and memory"] = plan.measure.rounds * len(plan.variants) * 20.0
    return seconds_by_phase


def time_variants(trials: list[Trial], eval_data: CaptionedImages) -> dict[str, StepTiming]:
    """Time each variant.

    Args:
        trials: The trials, of which each variant's first is timed.
        eval_data: The split that is measured.

    Returns:
        What was timed, by variant.
    """
    timings = {}
    for trial in trials:
        if trial.variant not in timings:
            with progress_step(f"timing some steps of {trial.variant}"):
                timings[trial.variant] = time_steps(trial.config, eval_data)
            step = timings[trial.variant].seconds_per_step
            logger.info(f"{trial.variant}: {format(step, significant_format(step))} s a step")
    return timings
