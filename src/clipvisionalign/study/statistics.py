"""Statistics of variants over seeds: means with intervals, differences, and which of them are shown.

Two things are drawn at random in a study: the images that the gallery happens to hold, and the seeds of the
trainings. A figure of S seeds on N images is a table (S, N), what each image brings to it in each run, and an
interval has to count both: a hundred thousand images do not make up for two seeds. With both as random effects,
crossed, the variance of the mean is that of the images, estimated by (MS images - MS rest) / (S N), plus that of
the seeds, estimated by MS seeds / (S N). Each half-width is squared and multiplied by the square of its own quantile,
Student's with N - 1 and with S - 1 degrees of freedom, and the two are added (`half_width`): such an interval covers at
least what it promises, however the variance is shared out between the two (Banerjee's inequality). It is never narrower
than the interval of the images alone, and p is the level at which the interval ends at zero. Two seeds leave one
degree of freedom, whose quantile is 12.7: the interval holds, and is wide. One seed alone has no information on seeds:
its interval is of the images only, and is marked so (no spread).

Fewer than `MIN_IMAGES` images give no interval and no test. Where no two images differ there is no variance to go
by: then the interval is how much a share of images that was not seen could change, of at most 1 - 0.025^(1 / N).

`benchmarks/intervals.py` simulates the rule beside others.

Sources: Banerjee, Sankhya 22 (1960) 357-358, for sums of variances, each with its own quantile; Zou and Donner,
Statistics in Medicine 27 (2008), who add squared half-widths in general; Dorfman, Berbaum and Metz, Investigative
Radiology 27 (1992), for readers and cases both at random; Clopper and Pearson, Biometrika 26 (1934), for the share that
was not seen; Holm, Scandinavian Journal of Statistics 6 (1979), for many comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from clipvisionalign.retrieval.metrics import MIN_IMAGES, RECALL_AT, SIGNIFICANCE_LEVEL, average_precision, unseen_share
from clipvisionalign.retrieval.ranks import PositiveRanks
from clipvisionalign.study.interval_inversion import level_at_zero

#: What is compared between variants, in this order.
COMPARED_METRICS = ("rsum", *(f"{way} recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in RECALL_AT))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95% interval.

    Attributes:
        value: The mean.
        low: Lower end of the interval; None where there is too little data.
        high: Upper end likewise.
        spread: Standard deviation between seeds; None for one seed.
        p: Two-sided p of its being zero; None where there is too little data.
    """

    value: float
    low: float | None
    high: float | None
    spread: float | None
    p: float | None

    def to_dict(self) -> dict[str, float | None]:
        """The estimate as report.json records it.

        Returns:
            Its fields by name.
        """
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """The difference a - b of two variants in one metric.

    Attributes:
        a: Name of a variant.
        b: Name of the other.
        metric: The metric, one of `COMPARED_METRICS`.
        seeds: Seeds that both have, which are paired.
        estimate: The mean difference.
        p_holm: p corrected by Holm for all tested comparisons of its family; None where this one is not tested.
        stds: Standard deviations of the contributions: of the images over the seeds, and of the rest.
    """

    a: str
    b: str
    metric: str
    seeds: tuple[int, ...]
    estimate: Estimate
    p_holm: float | None
    stds: tuple[float, float] = (0.0, 0.0)

    @property
    def is_significant(self) -> bool:
        """Whether p, corrected by Holm's procedure, is below `SIGNIFICANCE_LEVEL`."""
        return self.p_holm is not None and self.p_holm < SIGNIFICANCE_LEVEL

    def to_dict(self) -> dict[str, object]:
        """The difference as report.json records it.

        Returns:
            Its fields, those of the estimate, and "shown".
        """
        header = {"a": self.a, "b": self.b, "figure": self.metric, "seeds": list(self.seeds)}
        stds = dict(zip(("image_std", "rest_std"), self.stds, strict=True))
        return {**header, **self.estimate.to_dict(), **stds, "p_holm": self.p_holm, "shown": self.is_significant}


def image_contributions(ranks: PositiveRanks, caption_image: np.ndarray, metric: str) -> np.ndarray:
    """What each image contributes to a metric: the mean is the metric itself.

    Captions are counted with their image. Where images have unequal numbers of captions a recall of captions is a ratio
    of two sums, here in its linear part, so that the variance is that of the ratio.

    Args:
        ranks: Ranks of N images and M captions.
        caption_image: (M,) number of each caption's image.
        metric: One of `COMPARED_METRICS`, or a direction with "map".

    Returns:
        (N,) in percent; of rsum 0 to 600.
    """
    if metric == "rsum":
        return np.sum(
            [image_contributions(ranks, caption_image, name) for name in COMPARED_METRICS if name != "rsum"], axis=0
        )
    direction, name = metric.split(" ")
    direction_ranks = getattr(ranks, direction)
    hits = (
        average_precision(direction_ranks) if name == "map" else direction_ranks[:, 0] <= int(name.rpartition("_")[2])
    )
    if direction == "image_to_text":
        return 100.0 * hits
    return ratio_contributions(hits.astype(np.float64), caption_image, len(ranks.image_to_text))


def of_units(table: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """What each unit contributes to the mean of tables, in its linear part, with the same mean.

    Args:
        table: (..., N).
        unit: (N,) numbers from 0; entries of one unit are drawn together, and are no evidence beside each other.

    Returns:
        (..., U).
    """
    size = np.bincount(unit)
    mean = table.mean(axis=-1, keepdims=True)
    sums = np.apply_along_axis(lambda row: np.bincount(unit, row, len(size)), -1, table)
    return mean + (sums - mean * size) * len(size) / table.shape[-1]


def ratio_contributions(is_hit: np.ndarray, image_index: np.ndarray, images: int) -> np.ndarray:
    """What each image contributes to the percentage of queries that are found.

    Args:
        is_hit: (Q,) whether each query is found.
        image_index: (Q,) number of the image that each query is counted with.
        images: Number N of images.

    Returns:
        (N,) whose mean is the percentage.

    >>> ratio_contributions(np.array([1.0, 0.0]), np.array([0, 1]), 2).tolist()
    [100.0, 0.0]
    """
    queries_per_image = np.bincount(image_index, minlength=images)
    mean = is_hit.mean()
    hits_by_image = np.bincount(image_index, weights=is_hit, minlength=images)
    return 100.0 * (mean + (hits_by_image - mean * queries_per_image) * images / len(is_hit))


def mean_squares(table: np.ndarray) -> tuple[Any, Any, Any]:
    """Mean squares of images, seeds and rest.

    Args:
        table: (..., S, N), S seeds on N images.

    Returns:
        Three of shape (...); those of seeds and rest are 0 for one seed.

    Source: Dorfman, Berbaum and Metz, Investigative Radiology 27 (1992), for two crossed random effects.
    """
    seeds, images = table.shape[-2:]
    by_image, by_seed = table.mean(axis=-2), table.mean(axis=-1)
    ms_image = seeds * by_image.var(axis=-1, ddof=1)
    if seeds == 1:
        return ms_image, 0.0 * ms_image, 0.0 * ms_image
    ms_seed = images * by_seed.var(axis=-1, ddof=1)
    rest = table - by_image[..., None, :] - by_seed[..., :, None] + table.mean(axis=(-2, -1))[..., None, None]
    return ms_image, ms_seed, (rest**2).sum(axis=(-2, -1)) / ((seeds - 1) * (images - 1))


def half_width(squares: tuple[Any, Any, Any], seeds: int, images: int, level: Any = SIGNIFICANCE_LEVEL) -> Any:
    """Half of the interval at 1 - level, with seeds and images at random.

    Args:
        squares: As `mean_squares` returns them.
        seeds: Number S of seeds.
        images: Number N of images.
        level: The level, a number or an array.

    Returns:
        Of the shape of `squares` and `level`; never below that of the images alone.

    Source: Banerjee, Sankhya 22 (1960) 357-358; Zou and Donner, Statistics in Medicine 27 (2008).
    """
    ms_image, ms_seed, ms_rest = squares
    image_factor = t_quantile(images - 1, level) ** 2
    image_variance = image_factor * ms_image
    if seeds == 1:
        return np.sqrt(image_variance / images)
    total_variance = image_factor * np.maximum(ms_image - ms_rest, 0) + t_quantile(seeds - 1, level) ** 2 * ms_seed
    return np.sqrt(np.maximum(image_variance, total_variance) / (seeds * images))


def p_value(value: float, squares: tuple[float, float, float], seeds: int, images: int) -> float:
    """The level at which the interval around a value ends at zero.

    Args:
        value: The mean.
        squares: As `mean_squares` returns them, numbers.
        seeds: Number S of seeds.
        images: Number N of images.

    Returns:
        At least 2^(1 - N), at most 1.
    """
    return level_at_zero(value, lambda level: float(half_width(squares, seeds, images, level)), images)


def t_quantile(degrees_of_freedom: int, level: Any) -> Any:
    """Student's quantile, beyond which on either side lies a share of `level` in all.

    Args:
        degrees_of_freedom: At least 1.
        level: A number or an array.

    Returns:
        Of the shape of `level`.
    """
    from scipy.special import stdtrit

    return -stdtrit(degrees_of_freedom, np.asarray(level) / 2)


def estimate(
    table: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf), level: float = SIGNIFICANCE_LEVEL
) -> Estimate:
    """The mean of a table, or of a difference of two, with both seeds and images at random.

    Args:
        table: (S, N), S seeds on N images.
        bounds: Between which the metric lies; the interval does not reach beyond.
        level: Of the interval.

    Returns:
        The estimate; without interval and p for fewer than `MIN_IMAGES` images, or, without bounds, where no two images
        differ.

    Raises:
        ValueError: There is no image.

    >>> result = estimate(np.array([[0.0, 20, 0, 40, 0, 20, 0, 60], [20.0, 20, 0, 20, 0, 0, 20, 40]]), (-600, 600))
    >>> result.value, round(result.low), round(result.high)
    (16.25, -4, 36)
    """
    seeds, images = table.shape
    if not images:
        raise ValueError("an interval needs images, and there is none")
    value = float(table.mean())
    spread = float(table.mean(axis=1).std(ddof=1)) if seeds > 1 else None
    if images < MIN_IMAGES:
        return Estimate(value, None, None, spread, None)
    squares = mean_squares(table)
    margin, p = float(half_width(squares, seeds, images, level)), p_value(value, squares, seeds, images)
    # A variance that is rounding and nothing else is none.
    if squares[0] > (1e-9 * np.abs(table).max()) ** 2:
        return Estimate(value, max(value - margin, bounds[0]), min(value + margin, bounds[1]), spread, p)
    if not np.isfinite(bounds).all():
        return Estimate(value, None, None, spread, None)
    unseen = unseen_share(images, level)
    low = min(value - margin, value - unseen * (value - bounds[0]))
    high = max(value + margin, value + unseen * (bounds[1] - value))
    # The same the other way round: the share of images at the far bound with which the mean would be zero.
    far_bound = bounds[0] if value > 0 else bounds[1]
    p = max(p, min(1.0, 2 * (far_bound / (far_bound - value)) ** images)) if value and far_bound else p
    return Estimate(value, max(low, bounds[0]), min(high, bounds[1]), spread, p)


def metric_bounds(metric: str) -> tuple[float, float]:
    """Between which a metric lies.

    Args:
        metric: One of `COMPARED_METRICS`.

    Returns:
        0 and 600 for rsum, else 0 and 100.
    """
    return (0.0, 600.0) if metric == "rsum" else (0.0, 100.0)


def holm_correction(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p values.

    Args:
        p: The p values.

    Returns:
        Corrected ones, in their order.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).

    >>> [round(p, 3) for p in holm_correction([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p)
    corrected, highest = np.empty(len(p)), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = highest
    return corrected.tolist()


def holm_correction_of_tested(p: Sequence[float | None]) -> list[float | None]:
    """Holm's correction of those p values that are there.

    Args:
        p: The p values; None for a comparison that is not tested, which counts as none.

    Returns:
        Corrected ones, in their order; None stays None.
    """
    corrected = iter(holm_correction([each for each in p if each is not None]))
    return [None if each is None else next(corrected) for each in p]


def pairwise_differences(family: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]]) -> list[Difference]:
    """The difference of every two variants in every metric of a family, on the same images and paired by seed.

    A seed that only one of two has is left out of their difference, and two without a common seed have none
    (`unpaired_seeds` names both). p is corrected over the whole family.

    Args:
        family: By metric, by variant, by seed (N,) contributions of the images.

    Returns:
        The differences.
    """
    estimates: list[tuple[str, str, str, tuple[int, ...], Estimate]] = []
    stds = []
    for metric, tables in family.items():
        max_value = metric_bounds(metric)[1]
        for a, b in combinations(tables, 2):
            seeds = tuple(seed for seed in tables[a] if seed in tables[b])
            if seeds:
                table = np.stack([tables[a][seed] - tables[b][seed] for seed in seeds])
                estimates.append((a, b, metric, seeds, estimate(table, (-max_value, max_value))))
                stds.append(_component_stds(table))
    corrected = holm_correction_of_tested([each.p for *_, each in estimates])
    return [Difference(*each, p, std) for each, p, std in zip(estimates, corrected, stds, strict=True)]


def _component_stds(table: np.ndarray) -> tuple[float, float]:
    ms_image, _, ms_rest = mean_squares(table) if table.shape[1] > 1 else (0.0, 0.0, 0.0)
    return float(np.sqrt(max(ms_image - ms_rest, 0.0) / len(table))), float(np.sqrt(ms_rest))


def unpaired_seeds(seeds: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """Every two variants of which one has seeds that the other lacks.

    Args:
        seeds: Seeds by variant.

    Returns:
        For each two "a", "b", "paired", "only_a" and "only_b".

    >>> unpaired_seeds({"self": [0, 1], "late": [0]})[0]["only_a"]
    [1]
    """
    rows = []
    for a, b in combinations(seeds, 2):
        only_a, only_b = ([seed for seed in seeds[one] if seed not in seeds[other]] for one, other in ((a, b), (b, a)))
        if only_a or only_b:
            paired = [seed for seed in seeds[a] if seed in seeds[b]]
            rows.append({"a": a, "b": b, "paired": paired, "only_a": only_a, "only_b": only_b})
    return rows
