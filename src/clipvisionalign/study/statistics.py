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

#: What is compared between variants, in this order.
COMPARED_METRICS = ("rsum", *(f"{way} recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in RECALL_AT))


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95% interval.

    spread: standard deviation between seeds, None for one seed. p: of its being zero, two-sided. low, high and p are
    None where there is too little data.
    """

    value: float
    low: float | None
    high: float | None
    spread: float | None
    p: float | None

    def to_dict(self) -> dict[str, float | None]:
        """What report.json holds."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """a - b in one figure.

    seeds: those that both have, which are paired; p_holm: p corrected for all comparisons of its family that are
    tested, None where this one is not; shown: whether that is below 5%.
    """

    a: str
    b: str
    metric: str
    seeds: tuple[int, ...]
    estimate: Estimate
    p_holm: float | None

    @property
    def is_significant(self) -> bool:
        """Whether p, corrected by Holm's procedure, is below `SIGNIFICANCE_LEVEL`."""
        return self.p_holm is not None and self.p_holm < SIGNIFICANCE_LEVEL

    def to_dict(self) -> dict[str, object]:
        """What report.json holds."""
        header = {"a": self.a, "b": self.b, "figure": self.metric, "seeds": list(self.seeds)}
        return {**header, **self.estimate.to_dict(), "p_holm": self.p_holm, "shown": self.is_significant}


def image_contributions(ranks: PositiveRanks, caption_image: np.ndarray, metric: str) -> np.ndarray:
    """What each image brings to a figure (N,): the mean is the figure itself, in percent (rsum: 0 to 600).

    Captions are counted with their image. Where images have unequal numbers of captions a recall of captions is a ratio
    of two sums, here in its linear part, so that the variance is that of the ratio.
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
    """What each unit brings to the mean of tables (..., N), in its linear part: (..., U), of the same mean.

    unit: (N,) numbers from 0; entries of one unit are drawn together, and are no evidence beside each other.
    """
    size = np.bincount(unit)
    mean = table.mean(axis=-1, keepdims=True)
    sums = np.apply_along_axis(lambda row: np.bincount(unit, row, len(size)), -1, table)
    return mean + (sums - mean * size) * len(size) / table.shape[-1]


def ratio_contributions(is_hit: np.ndarray, image_index: np.ndarray, images: int) -> np.ndarray:
    """What each of N images brings to the percentage of queries that are found. is_hit, image_index: (Q,) -> (N,)."""
    queries_per_image = np.bincount(image_index, minlength=images)
    mean = is_hit.mean()
    hits_by_image = np.bincount(image_index, weights=is_hit, minlength=images)
    return 100.0 * (mean + (hits_by_image - mean * queries_per_image) * images / len(is_hit))


def mean_squares(table: np.ndarray) -> tuple[Any, Any, Any]:
    """Mean squares of images, seeds and rest of tables (..., S, N); those of seeds and rest are 0 for one seed."""
    seeds, images = table.shape[-2:]
    by_image, by_seed = table.mean(axis=-2), table.mean(axis=-1)
    ms_image = seeds * by_image.var(axis=-1, ddof=1)
    if seeds == 1:
        return ms_image, 0.0 * ms_image, 0.0 * ms_image
    ms_seed = images * by_seed.var(axis=-1, ddof=1)
    rest = table - by_image[..., None, :] - by_seed[..., :, None] + table.mean(axis=(-2, -1))[..., None, None]
    return ms_image, ms_seed, (rest**2).sum(axis=(-2, -1)) / ((seeds - 1) * (images - 1))


def half_width(squares: tuple[Any, Any, Any], seeds: int, images: int, level: Any = SIGNIFICANCE_LEVEL) -> Any:
    """Half of the interval at 1 - level. squares: what `mean_squares` gives, numbers or arrays."""
    ms_image, ms_seed, ms_rest = squares
    image_factor = _t_quantile(images - 1, level) ** 2
    image_variance = image_factor * ms_image
    if seeds == 1:
        return np.sqrt(image_variance / images)
    total_variance = image_factor * np.maximum(ms_image - ms_rest, 0) + _t_quantile(seeds - 1, level) ** 2 * ms_seed
    return np.sqrt(np.maximum(image_variance, total_variance) / (seeds * images))


def two_seeds_widen(row: Mapping[str, Any]) -> bool:
    """Whether most of an estimate's squared half-width is of its two seeds: then a third seed narrows it."""
    if None in (row["low"], row["spread"]):
        return False
    reach = max(row["high"] - row["value"], row["value"] - row["low"])
    # The variance of a mean of two is half of that of each.
    return bool((_t_quantile(1, SIGNIFICANCE_LEVEL) * row["spread"]) ** 2 / 2 > reach**2 / 2)


def p_value(value: float, squares: tuple[float, float, float], seeds: int, images: int) -> float:
    """The level at which the interval around `value` ends at zero; never below 2^(1 - images)."""
    from scipy.optimize import brentq

    def excess(log_level: float) -> float:
        return abs(value) - float(half_width(squares, seeds, images, np.exp(log_level)))

    # Below 1e-100 the quantiles leave what floating-point numbers hold.
    min_log_level = max((1 - images) * np.log(2), np.log(1e-100))
    if not value:
        return 1.0
    if excess(min_log_level) >= 0:
        return float(np.exp(min_log_level))
    return float(np.exp(brentq(excess, min_log_level, 0.0, xtol=1e-12))) if excess(0.0) > 0 else 1.0


def _t_quantile(degrees_of_freedom: int, level: Any) -> Any:
    """Student's two-sided quantile."""
    from scipy.special import stdtrit

    return -stdtrit(degrees_of_freedom, np.asarray(level) / 2)


def estimate(table: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Estimate:
    """The mean of (S, N), or of a difference of two such, with both seeds and images at random.

    bounds: between which the figure lies by its nature; the interval does not reach beyond. With fewer than
    `MIN_IMAGES` images, or without bounds where no two images differ, interval and p are None. Raises ValueError
    for no image.

    >>> import numpy as np
    >>> found = estimate(np.array([[0.0, 20, 0, 40, 0, 20, 0, 60], [20.0, 20, 0, 20, 0, 0, 20, 40]]), (-600, 600))
    >>> found.value, round(found.low), round(found.high)
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
    margin, p = float(half_width(squares, seeds, images)), p_value(value, squares, seeds, images)
    # A variance that is rounding and nothing else is none.
    if squares[0] > (1e-9 * np.abs(table).max()) ** 2:
        return Estimate(value, max(value - margin, bounds[0]), min(value + margin, bounds[1]), spread, p)
    if not np.isfinite(bounds).all():
        return Estimate(value, None, None, spread, None)
    unseen = unseen_share(images)
    low = min(value - margin, value - unseen * (value - bounds[0]))
    high = max(value + margin, value + unseen * (bounds[1] - value))
    # The same the other way round: the share of images at the far bound with which the mean would be zero.
    far_bound = bounds[0] if value > 0 else bounds[1]
    p = max(p, min(1.0, 2 * (far_bound / (far_bound - value)) ** images)) if value and far_bound else p
    return Estimate(value, max(low, bounds[0]), min(high, bounds[1]), spread, p)


def metric_bounds(metric: str) -> tuple[float, float]:
    """Between which a figure lies: percent, or rsum."""
    return (0.0, 600.0) if metric == "rsum" else (0.0, 100.0)


def holm_correction(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p values, in their order."""
    order = np.argsort(p)
    corrected, highest = np.empty(len(p)), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = highest
    return corrected.tolist()


def holm_correction_of_tested(p: Sequence[float | None]) -> list[float | None]:
    """Holm's correction of those that are tested; None stays None, and counts as no comparison."""
    corrected = iter(holm_correction([each for each in p if each is not None]))
    return [None if each is None else next(corrected) for each in p]


def pairwise_differences(family: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]]) -> list[Difference]:
    """Every two variants in every figure of a family: on the same images, and each seed with the same of the other.

    family: figure -> variant -> seed -> (N,). A seed that only one of two has is left out of their difference, and two
    without a common seed have none (`unpaired_seeds` names both). p is corrected over the whole family.
    """
    estimates: list[tuple[str, str, str, tuple[int, ...], Estimate]] = []
    for metric, tables in family.items():
        max_value = metric_bounds(metric)[1]
        for a, b in combinations(tables, 2):
            seeds = tuple(seed for seed in tables[a] if seed in tables[b])
            if seeds:
                table = np.stack([tables[a][seed] - tables[b][seed] for seed in seeds])
                estimates.append((a, b, metric, seeds, estimate(table, (-max_value, max_value))))
    corrected = holm_correction_of_tested([each.p for *_, each in estimates])
    return [Difference(*each, p) for each, p in zip(estimates, corrected, strict=True)]


def unpaired_seeds(seeds: Mapping[str, Sequence[int]]) -> list[dict[str, Any]]:
    """Every two variants of which one has seeds that the other lacks: "paired", "only_a", "only_b".

    seeds: by variant.
    """
    rows = []
    for a, b in combinations(seeds, 2):
        only_a, only_b = ([seed for seed in seeds[one] if seed not in seeds[other]] for one, other in ((a, b), (b, a)))
        if only_a or only_b:
            paired = [seed for seed in seeds[a] if seed in seeds[b]]
            rows.append({"a": a, "b": b, "paired": paired, "only_a": only_a, "only_b": only_b})
    return rows
