"""What a study can show before it is carried out: widths of intervals, differences that are shown, seeds that it takes.

All of it follows from standard deviations of the difference of two variants: over images, between seeds, and of the
rest. They are taken from a study that was carried out, whose own few seeds make the second one uncertain: the promise
counts that in, by the F distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.data.captioned import CaptionedImages
from clipvisionalign.retrieval.metrics import SIGNIFICANCE_LEVEL
from clipvisionalign.study.config import Plan
from clipvisionalign.study.report.build import read_report
from clipvisionalign.study.sequential import SEQUENTIAL_LEVEL
from clipvisionalign.study.statistics import half_width, t_quantile
from clipvisionalign.study.units import image_units

#: In this share of studies an interval is no wider than promised; a difference is shown that often.
ASSURANCE, POWER = 0.9, 0.8
#: Numbers of seeds that are told.
SEED_COUNTS = (2, 3, 5, 8, 12)
#: Simulated studies behind the difference that is shown.
_SIMULATED = 20_000


@dataclass(frozen=True)
class DifferenceSpread:
    """How much the difference of two variants varies.

    Attributes:
        image_std: Standard deviation over images of what each contributes to it on average over seeds.
        rest_std: Standard deviation of what an image contributes with one seed beyond that.
        seed_std: Standard deviation between seeds of its mean over the images.
        seeds: Seeds from which it was estimated.
        images: Images from which it was.
        source: Where it comes from.
    """

    image_std: float
    rest_std: float
    seed_std: float
    seeds: int
    images: int
    source: str


#: rsum on Flickr8k, of two designs over the same towers: as in `docs/results.md`, "Intervals over seeds and images".
PUBLISHED = DifferenceSpread(40.0, 113.0, 4.0, 3, 1000, "designs over the same frozen towers on Flickr8k")


def spread_of_difference(row: Mapping[str, Any], images: int, source: str) -> DifferenceSpread | None:
    """The spread behind a difference in a report.

    Args:
        row: As report.json has it: "image_std", "rest_std", "spread", "seeds".
        images: Images (or identities) of the gallery.
        source: Where it comes from.

    Returns:
        The spread; None where the report is from before it was recorded, or has one seed.
    """
    seeds = len(row.get("seeds") or ())
    if seeds < 2 or None in (row.get("image_std"), row.get("rest_std"), row["spread"]):
        return None
    return DifferenceSpread(row["image_std"], row["rest_std"], row["spread"], seeds, images, source)


def median_spread(rows: Sequence[Mapping[str, Any]], images: int, source: str) -> DifferenceSpread | None:
    """The median spread of several differences.

    Args:
        rows: As report.json has them.
        images: Images (or identities) of the gallery.
        source: Where they come from.

    Returns:
        The spread, with the fewest seeds of any; None where none of them has one.
    """
    several = [spread for row in rows if (spread := spread_of_difference(row, images, source)) is not None]
    if not several:
        return None
    image_std, rest_std, seed_std = (
        float(np.median([getattr(each, name) for each in several])) for name in ("image_std", "rest_std", "seed_std")
    )
    return DifferenceSpread(image_std, rest_std, seed_std, min(each.seeds for each in several), images, source)


def promised_half_width(
    spread: DifferenceSpread, seeds: int, images: int, level: float = SIGNIFICANCE_LEVEL, assurance: float = ASSURANCE
) -> float:
    """What half of an interval does not exceed, in a share of studies.

    Args:
        spread: Of a study that was carried out.
        seeds: Seeds of the study to come.
        images: Its images.
        level: Of its interval.
        assurance: The share.

    Returns:
        In the metric's points.

    >>> spread = DifferenceSpread(40.0, 110.0, 4.0, 20, 1000, "")
    >>> [round(promised_half_width(spread, seeds, 1000), 1) for seeds in (3, 5, 12)]
    [16.2, 7.9, 4.4]
    """
    image_factor = t_quantile(images - 1, level) ** 2 / images * _f_quantile(assurance, images - 1, spread.images - 1)
    images_alone = image_factor * (spread.image_std**2 + spread.rest_std**2 / seeds)
    if seeds == 1:
        return float(np.sqrt(images_alone))
    # What the probe's seeds show, and what images alone let the means of seeds differ by.
    measured = _seed_variance(spread, images) * _f_quantile(assurance, seeds - 1, spread.seeds - 1)
    least = spread.rest_std**2 / images * _f_quantile(assurance, seeds - 1, np.inf)
    seed_variance = max(measured, least) / seeds
    both = image_factor * spread.image_std**2 + t_quantile(seeds - 1, level) ** 2 * seed_variance
    return float(np.sqrt(max(images_alone, both)))


@cache
def _f_quantile(share: float, numerator: float, denominator: float) -> float:
    """Of the F distribution; with endless degrees of freedom of the denominator, of chi-squared by its own."""
    from scipy.special import chdtri, fdtri

    if np.isinf(denominator):
        return float(chdtri(numerator, 1 - share)) / numerator
    return float(fdtri(numerator, denominator, share))


def _seed_variance(spread: DifferenceSpread, images: int) -> float:
    """Between seeds, of the mean over another number of images."""
    return spread.seed_std**2 + spread.rest_std**2 * max(1 / images - 1 / spread.images, 0.0)


def shown_difference(
    spread: DifferenceSpread, seeds: int, images: int, level: float = SIGNIFICANCE_LEVEL, power: float = POWER
) -> float:
    """The difference that is shown in a share of studies, if the spread is what it was.

    Args:
        spread: Of a study that was carried out.
        seeds: Seeds of the study to come.
        images: Its images.
        level: Of its test.
        power: The share.

    Returns:
        In the metric's points.
    """
    generator = np.random.default_rng(0)
    seed_variance = max(_seed_variance(spread, images), spread.rest_std**2 / images)
    image_mean = seeds * spread.image_std**2 + spread.rest_std**2
    image_square = image_mean * generator.chisquare(images - 1, _SIMULATED) / (images - 1)
    seed_square = np.zeros(_SIMULATED)
    if seeds > 1:
        seed_square = images * seed_variance * generator.chisquare(seeds - 1, _SIMULATED) / (seeds - 1)
    noise = generator.normal(0.0, np.sqrt(spread.image_std**2 / images + seed_variance / seeds), _SIMULATED)
    squares = image_square, seed_square, spread.rest_std**2 if seeds > 1 else 0.0
    margin = half_width(squares, seeds, images, level)
    return float(np.quantile(margin - noise, power))


def seeds_for_width(spread: DifferenceSpread, images: int, width: float, level: float, max_seeds: int) -> int | None:
    """The seeds with which an interval is as narrow as asked, in `ASSURANCE` of studies.

    Args:
        spread: Of a study that was carried out.
        images: Images of the study to come.
        width: Upper end minus lower end.
        level: Of the interval.
        max_seeds: Seeds at most.

    Returns:
        The number; None where it is more.
    """
    counts = range(3, max_seeds + 1)
    return next((n for n in counts if 2 * promised_half_width(spread, n, images, level) <= width), None)


def power_of_plan(plan: Plan, study: Path, eval_data: CaptionedImages, like: str = "") -> list[str]:
    """What a plan can show, by a study that was carried out.

    Args:
        plan: The plan.
        study: Its folder; its own report is taken where it has one of two seeds.
        eval_data: The split to measure.
        like: The folder or the report.json of another study, which counts more; "" for none.

    Returns:
        Lines for the terminal.

    Raises:
        ValueError: `like` is no report, or has no spread of this figure.
    """
    images = int(image_units(eval_data).max()) + 1
    metric, seeds = plan.compare.figure, len(plan.seeds)
    spread = _spread_in(like, plan) if like else None
    if like and spread is None:
        raise ValueError(f"{like}: has no differences in {metric} over two seeds; 'report {like}' adds their spread")
    if not like:
        with suppress(ValueError, OSError):
            spread = _spread_in(study, plan)
    if spread is None and metric != "rsum":
        return [f"what can be shown in {metric}: --like STUDY computes it from a study that was carried out"]
    spread = spread or PUBLISHED
    lines = describe_power(spread, seeds, images, metric)
    if plan.until.width:
        count = seeds_for_width(spread, images, plan.until.width, SEQUENTIAL_LEVEL, plan.until.max_seeds)
        needed = f"at most {count} seeds" if count else f"more than {plan.until.max_seeds} seeds, or more images"
        lines.append(f"an interval {plan.until.width:g} wide, with a look after each seed: {needed} in 9 of 10 studies")
    return lines


def _spread_in(study: str | Path, plan: Plan) -> DifferenceSpread | None:
    """The spread of a study's differences: of the compared pair where it has that, else their median."""
    report = read_report(study)
    results, pair = report["results"], {plan.compare.a, plan.compare.b}
    rows = [row for row in results["differences"] if row["figure"] == plan.compare.figure]
    rows = [row for row in rows if {row["a"], row["b"]} == pair] or rows
    units = results.get("units") or results.get("identities") or results["gallery"]["images"]
    return median_spread(rows, units, str(study))


def describe_power(spread: DifferenceSpread, seeds: int, images: int, metric: str = "rsum") -> list[str]:
    """What a study can show, in lines for the terminal.

    Args:
        spread: Of a study that was carried out.
        seeds: Seeds of the study to come.
        images: Its images.
        metric: What is compared.

    Returns:
        The lines.
    """
    lines = [
        f"what {images:,} images can show in {metric}, by the spread of {spread.source} ({spread.images:,} images, "
        f"{spread.seeds} seeds):",
        "   seeds   interval, in 90 % of studies within   difference that 80 % of studies show",
    ]
    for count in sorted({*SEED_COUNTS, seeds}):
        mark = "  <- this plan" if count == seeds else ""
        width, shown = promised_half_width(spread, count, images), shown_difference(spread, count, images)
        lines.append(f"  {count:6}   {f'+-{width:.1f}':>36}   {shown:37.1f}{mark}")
    return lines
