"""The learning curve of a run: the same training with fewer captions, measured on the same images.

A run's settings are repeated with 1/8, 1/4 and 1/2 of its training images, each with all of its captions, as more data
would be collected. The subsets are nested: images are taken in the order of a hash of their names (`train_images`).
Every training starts from the same weights, and takes as many steps as the run itself, so that its epochs are 8, 4 and
2 times as many: what is compared is the data alone. With equal epochs a training with less data would also be a shorter
one, and a run that was stopped too early would appear to lack captions. Epochs are chosen on dev as in the run, with a
patience of as many steps, so that a small subset is not trained beyond its best.

The figures are the cross-fitted ones of the whole dev gallery that every run keeps (`ranks.npz`): nothing is encoded or
ranked again. The folders are runs like any other: what is finished is used again, what was stopped is resumed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.adaptation.curve_trainings import plan_trainings, planned_steps, settings_of, training_counts
from clipvisionalign.adaptation.extrapolation import (
    Extrapolation,
    FittedCurve,
    extrapolate,
    fit_learning_curve,
    paired_noise,
)
from clipvisionalign.adaptation.start import StartOverlap, start_overlap
from clipvisionalign.counts import count_noun
from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.data.check import check
from clipvisionalign.data.run_data import read_data_of_run
from clipvisionalign.json_io import read_json, write_json
from clipvisionalign.models.tower_cache import TowerOutputCache
from clipvisionalign.progress import progress
from clipvisionalign.retrieval.evaluate import RANKS_FILE, load_ranks
from clipvisionalign.retrieval.metrics import (
    MIN_IMAGES,
    RESAMPLES,
    MetricEstimate,
    bootstrap_weights,
    chance_metrics,
    metrics_of_ranks,
)
from clipvisionalign.retrieval.ranks import PositiveRanks, Positives
from clipvisionalign.study.statistics import image_contributions, of_units
from clipvisionalign.training.config import RunConfig
from clipvisionalign.training.data_checks import check_data_unchanged
from clipvisionalign.training.halves import positives_of
from clipvisionalign.training.train import resume, train

logger = logging.getLogger(__name__)

#: What was found, in the folder of the trainings.
CURVE_FILE = "curve.json"


@dataclass(frozen=True)
class CurvePoint:
    """A training of the curve.

    Attributes:
        part: share of the run's training images.
        images: training images.
        captions: training captions.
        rsum: figure on dev, with the 95% bootstrap interval over images of dev.
        run: run folder.
        steps: steps that it took.
    """

    part: float
    images: int
    captions: int
    rsum: MetricEstimate
    run: str
    steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        counts = {"part": self.part, "images": self.images, "captions": self.captions, "steps": self.steps}
        return {**counts, "rsum": self.rsum.to_dict(), "run": self.run}


@dataclass(frozen=True)
class LearningCurve:
    """A learning curve and what it predicts.

    Attributes:
        run: run folder.
        data: data set.
        images: images of dev.
        captions: captions of dev.
        chance: rsum of a random ranking of dev.
        steps: planned steps of the run; trainings in stages plan a few more, in whole epochs of each stage.
        points: trainings, by ascending number of captions; the last is the run itself.
        test: the run's own figure as predicted from the other points.
        twice: the figure with twice the captions, as predicted from all points.
        fitted: the fit to all points.
        start: training images that the start of all trainings was trained on before; None for none.
    """

    run: str
    data: str
    images: int
    captions: int
    chance: float
    steps: int
    points: list[CurvePoint]
    test: Extrapolation
    twice: Extrapolation
    fitted: FittedCurve
    start: StartOverlap | None = None

    @property
    def folder(self) -> Path:
        """Where the trainings are."""
        return Path(self.points[0].run).parent

    @property
    def holds(self) -> bool:
        """Whether the interval predicted from the other points holds the run's own figure."""
        return self.test.low <= self.points[-1].rsum.value <= self.test.high

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints, and curve.json holds."""
        header = {"run": self.run, "data": self.data, "split": "dev", "images": self.images, "captions": self.captions}
        return {
            **header, "chance": self.chance, "steps": self.steps, "points": [point.to_dict() for point in self.points],
            "test": {**self.test.to_dict(), "measured": self.points[-1].rsum.value, "holds": self.holds},
            "twice": self.twice.to_dict(), "start": self.start.to_dict() if self.start else None,
            "summary": self.summary(),
        }  # fmt: skip

    def summary(self) -> str:
        """What the figures carry on twice the captions, in one or two sentences."""
        twice, figures = self.twice, f"{self.twice.gain:+.1f} [{self.twice.gain_low:.1f}, {self.twice.gain_high:.1f}]"
        what = f"twice the captions ({twice.captions:,} in place of {self.points[-1].captions:,})"
        if twice.is_gain:
            message = f"{what} would bring {figures} rsum"
        elif twice.is_loss:
            message = f"{what} would cost rsum: {figures}"
        else:
            message = f"that {what} would bring more is not shown: {figures} rsum"
        if not self.holds:
            test = self.test
            message += (
                f"; but the curve of fewer captions did not predict this run: {test.value:.1f} [{test.low:.1f}, "
                f"{test.high:.1f}] predicted, {self.points[-1].rsum.value:.1f} measured"
            )
        if self.start:
            message += (
                f"; but all trainings start from {self.start.run}, which was trained on {self.start.images:,} of the "
                f"{count_noun(self.points[-1].images, 'image')} before, so that those on fewer captions have seen more "
                "than these, and a gain by more may be underestimated"
            )
        return message


def learning_curve(
    run: str | Path, folder: str | Path = "", encodings_cache: TowerOutputCache | None = None
) -> LearningCurve:
    """Train a run's settings with 1/8, 1/4 and 1/2 of its captions, and extrapolate to twice as many.

    Args:
        run: a finished run.
        folder: where the trainings are; by default `curve` in the run folder. What is finished there is used again, and
            what was stopped is resumed.
        encodings_cache: outputs of the same frozen towers in other runs of this process, as in `train`.

    Returns:
        The curve; also written to `curve.json` in the folder.

    Raises:
        FileNotFoundError: the folder is no finished run.
        FileExistsError: a training with other settings is in the folder.
        ValueError: the run has no learning curve (a stream, a model as it is, too few images), or several processes.
        DataError: the data are no longer those of the run.
    """
    run = Path(run)
    trainings = plan_trainings(run, folder)
    steps = planned_steps(settings_of(run), training_counts(run)[0])
    _require_optional_packages()
    check_data_unchanged(run, trainings[0].dataset)
    counts = ", ".join(f"{each.train_images:,}" for each in trainings)
    planned = ", ".join(f"{planned_steps(each, each.train_images):,}" for each in trainings)
    minutes = read_json(run / "results.json", "train the run again").get("training_seconds", 0) / 60
    logger.info(
        f"{run}: learning curve: trainings on {counts} images with {planned} steps; the run planned {steps:,} and took "
        f"{minutes:.1f} min"
    )
    if overlap := start_overlap(run):
        logger.warning(
            f"{run}: starts from {overlap.run}, which was trained on {overlap.images:,} of its training images: "
            "trainings on fewer captions start from weights that have seen more"
        )
    for config in progress(trainings, "learning curve, trainings", len(trainings)):
        _train_once(config, encodings_cache)
    curve = measure_curve(run, [Path(config.out) for config in trainings], steps)
    write_json(Path(trainings[0].out).parent / CURVE_FILE, curve.to_dict())
    return curve


def _require_optional_packages() -> None:
    """Raises ModuleNotFoundError for what is needed at the end, before anything is trained."""
    import matplotlib  # noqa: F401
    import scipy  # noqa: F401


def measure_curve(run: Path, folders: list[Path], steps: int = 0) -> LearningCurve:
    """The curve of trainings that are finished.

    Args:
        run: the run itself.
        folders: trainings with fewer captions, by ascending number.
        steps: planned steps of the run.

    Returns:
        Figures, with the predictions.

    Raises:
        ValueError: they were not measured on the same images, or on too few.
    """
    dev = _dev_gallery(run)
    positives = positives_of(dev)
    all_ranks = [_ranks_of(each, dev) for each in (*folders, run)]
    samples = _rsum_samples(all_ranks, positives)
    figures = [metrics_of_ranks(ranks, positives.caption_image, unit=positives.identity) for ranks in all_ranks]
    chance = chance_metrics(all_ranks[-1])["rsum"]
    counts = [training_counts(each) for each in (*folders, run)]
    points = [
        CurvePoint(images / counts[-1][0], images, captions, metrics.rsum, str(each), _steps_of(each))
        for each, (images, captions), metrics in zip((*folders, run), counts, figures, strict=True)
    ]
    numbers, values = [captions for _, captions in counts], [metrics.rsum.value for metrics in figures]
    test = extrapolate(numbers[:-1], values[:-1], numbers[-1], paired_noise(samples[:, :-1]), chance)
    noise = paired_noise(samples)
    twice = extrapolate(numbers, values, 2 * numbers[-1], noise, chance)
    fitted = fit_learning_curve(numbers, values, noise, chance)
    source, captions = str(dev.source), len(dev.captions)
    return LearningCurve(
        str(run), source, len(dev), captions, chance, steps, points, test, twice, fitted, start_overlap(run)
    )


def _train_once(config: RunConfig, encodings_cache: TowerOutputCache | None) -> None:
    """Train, resume what was stopped, and use what is finished."""
    out = Path(config.out)
    if (out / "results.json").is_file():
        check_data_unchanged(out, config.dataset)
        logger.info(f"{out}: finished already")
    elif (out / "config.yaml").is_file() or (out / "begun.yaml").is_file():
        resume(out, encodings_cache=encodings_cache)
    else:
        train(config, encodings_cache=encodings_cache)


def _steps_of(run: Path) -> int:
    """The steps that a finished run took; 0 where its version did not count them."""
    return int(read_json(run / "results.json").get("steps", 0))


def _dev_gallery(run: Path) -> CaptionedImages:
    """The dev images that the run was measured on."""
    dev, _ = check(read_data_of_run(run, split="dev").split("dev"), full=True, show_progress=True)
    return dev


def _ranks_of(run: Path, dev: CaptionedImages) -> PositiveRanks:
    """The ranks of a run on dev. Raises ValueError where they are of other images than `dev`."""
    ranks = load_ranks(run / RANKS_FILE)["ranks"]
    sizes, recorded = (len(dev), len(dev.captions)), (len(ranks.image_to_text), len(ranks.text_to_image))
    if sizes != recorded:
        images = [count_noun(each, "image") for each in (recorded[0], sizes[0])]
        raise ValueError(f"{run}: measured on {images[0]} of dev, and there are {images[1]} now; put the data back")
    return ranks


def _rsum_samples(all_ranks: list[PositiveRanks], positives: Positives) -> np.ndarray:
    """Bootstrap samples (R, K) of the rsum of K models, each sample of the same images. Raises ValueError for too few
    images."""
    table = np.stack([image_contributions(ranks, positives.caption_image, "rsum") for ranks in all_ranks])
    if positives.identity is not None:
        table = of_units(table, positives.identity)
    units = table.shape[1]
    if units < MIN_IMAGES:
        raise ValueError(f"dev has {count_noun(units, 'image')}: an interval needs {MIN_IMAGES} or more")
    return bootstrap_weights(units, RESAMPLES, 0)[1:] @ table.T / units
