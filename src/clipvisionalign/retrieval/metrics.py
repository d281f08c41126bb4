"""Retrieval figures with their intervals: recall@k, median and mean rank, mAP, mAP@R, rsum.

Every figure is over the whole gallery and all captions. The interval is a 95% bootstrap over images: an image is drawn
together with its captions, and with all images of its identity where there are identities; the gallery stays whole. It
works on ranks alone, so a thousand resamples cost less than a second and no similarity is computed twice.

Sources: Hodosh, Young and Hockenmaier, JAIR 47 (2013), for the task; Musgrave, Belongie and Lim, arXiv:2003.08505, for
mAP@R; Zheng et al., "Scalable Person Re-identification", ICCV 2015, for mAP; Efron and Tibshirani, "An Introduction to
the Bootstrap" (1993), for the percentile interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from clipvisionalign.retrieval.query_metrics import average_precision, average_precision_at_r, chance_recall
from clipvisionalign.retrieval.ranks import SINGLE_WORKER, PositiveRanks, Positives, WorkerShard, ranks_of_vectors
from clipvisionalign.retrieval.ties import as_vectors

RECALL_AT = (1, 5, 10)
RESAMPLES = 1000
SIGNIFICANCE_LEVEL = 0.05
#: Fewer images than this show nothing: without a difference, five that all favour the same side come about in
#: 2 / 2^5 = 6 % of cases. By the same reasoning no p is below 2^(1 - N).
MIN_IMAGES = 6
METRIC_NAMES = ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank", "mean_rank", "map", "map_at_r")


@dataclass(frozen=True)
class MetricEstimate:
    """A figure and its 95% interval.

    Attributes:
        value: The figure.
        low: Lower end of its interval; None where no interval was computed.
        high: Upper end likewise.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """The value and the ends of its interval, as results.json has them."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class RetrievalMetrics:
    """Retrieval figures of a model over one gallery.

    Recalls, mAP and mAP@R are shares (0 to 1), ranks count from 1, rsum is in percent (0 to 600).

    Attributes:
        images: Number of images that are queries; distractors are not among them.
        captions: Number of captions.
        image_to_text: Figures by name, see `METRIC_NAMES`: an image is found if any of its captions is within the first
            k.
        text_to_image: Likewise: a caption is found if any of its images is.
        rsum: Sum of the six recalls at 1, 5 and 10, in percent.
        ranks: The ranks that the figures were computed from.
    """

    images: int
    captions: int
    image_to_text: dict[str, MetricEstimate]
    text_to_image: dict[str, MetricEstimate]
    rsum: MetricEstimate
    ranks: PositiveRanks

    def to_dict(self) -> dict[str, Any]:
        """The figures under the keys that `--json` prints."""
        extra = {"distractors": self.ranks.distractors} if self.ranks.distractors else {}
        return {
            "images": self.images,
            **extra,
            "captions": self.captions,
            "image_to_text": {name: figure.to_dict() for name, figure in self.image_to_text.items()},
            "text_to_image": {name: figure.to_dict() for name, figure in self.text_to_image.items()},
            "rsum": self.rsum.to_dict(),
            "chance": self.chance,
        }

    @property
    def chance(self) -> dict[str, Any]:
        """The recalls and the rsum of a random ranking (`chance_metrics`), in the units of the figures beside it."""
        return chance_metrics(self.ranks)


def metric_label(name: str) -> str:
    """A figure's name as it is printed.

    Args:
        name: A name of `METRIC_NAMES`, or "rsum".

    Returns:
        Its label.

    >>> metric_label("recall_at_1"), metric_label("map_at_r"), metric_label("median_rank"), metric_label("rsum")
    ('R@1', 'mAP@R', 'median rank', 'rsum')
    """
    return name.replace("recall_at_", "R@").replace("map_at_r", "mAP@R").replace("map", "mAP").replace("_", " ")


def describe_rerank_gain(gain: Mapping[str, float | None], interval: Callable[[float], str]) -> str:
    """What re-ranking does to rsum, as its interval supports it: the middle of a sentence on "re-ranking".

    Args:
        gain: "value", "low" and "high" of the difference in rsum; low and high may be None.
        interval: From 1 to the figures as they are printed, from -1 to the same with their sign changed.

    Returns:
        A phrase such as "gains 3.1 [1.0, 5.2] in rsum over its own dual encoder".
    """
    low, high = gain["low"], gain["high"]
    if low is None or high is None:
        message = f"was not tested, as there are too few images or identities: {interval(1.0)}"
    elif low > 0:
        message = f"gains {interval(1.0)}"
    elif high < 0:
        message = f"loses {interval(-1.0)}"
    else:
        message = f"was not shown to gain: {interval(1.0)}"
    return f"{message} in rsum over its own dual encoder"


def retrieval_metrics(
    image_vectors: Any,
    caption_vectors: Any,
    caption_image: Any,
    identity: Any = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    shard: WorkerShard = SINGLE_WORKER,
    caption_group: Any = None,
) -> RetrievalMetrics:
    """Retrieval figures in both directions over the whole gallery, by dot products of vectors.

    Args:
        image_vectors: (N, D) array, tensor of any dtype and device, or list; `retrieval.ties` defines ties by dtype.
        caption_vectors: (M, D) of the same kinds.
        caption_image: (M,) index of each caption's image.
        identity: (N,) images of one identity are positives of each other's captions; None if each is its own.
        resamples: Number of bootstrap resamples; 0 computes no intervals (`low` and `high` are None).
        seed: Seed of the bootstrap.
        shard: The share of the ranking that this process computes, where several processes share it.
        caption_group: (M,) equal numbers for equal captions, each of which belongs to every image that has one of them.

    Returns:
        Recalls, ranks and mAP of both directions, and rsum.

    Raises:
        ValueError: Shapes do not fit, indices are out of range, an image has no caption, or values are not finite.

    >>> import numpy as np
    >>> vectors = np.eye(3)
    >>> retrieval_metrics(vectors, vectors, [0, 1, 2]).rsum.value
    600.0
    """
    image_vectors, caption_vectors = as_vectors(image_vectors, "image"), as_vectors(caption_vectors, "caption")
    positives = Positives.of(caption_image, len(image_vectors.values), identity, caption_group)
    ranks = ranks_of_vectors(image_vectors, caption_vectors, positives, shard)
    return metrics_of_ranks(ranks, positives.caption_image, resamples, seed, positives.identity)


def metrics_of_ranks(
    ranks: PositiveRanks, caption_image: np.ndarray, resamples: int = RESAMPLES, seed: int = 0,
    unit: np.ndarray | None = None,
) -> RetrievalMetrics:  # fmt: skip
    """The figures of given ranks, with bootstrap intervals.

    Args:
        ranks: Ranks of N images and M captions.
        caption_image: (M,) number of the image that a caption is drawn with.
        resamples: Number of bootstrap resamples; 0, or fewer than `MIN_IMAGES` units, computes no intervals.
        seed: Seed of the bootstrap.
        unit: (N,) numbers from 0, equal for images that are drawn together (`Positives.identity`); None draws each
            alone.

    Returns:
        The figures in both directions, and rsum.

    Source of the interval: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), the percentile interval.

    >>> ranks = PositiveRanks(np.array([[1], [3]]), np.array([[1], [2]]))
    >>> metrics_of_ranks(ranks, np.array([0, 1])).image_to_text["recall_at_1"].value
    0.5
    """
    images, captions = len(ranks.image_to_text), len(ranks.text_to_image)
    weights, units = _resampled(images, resamples, seed, unit)
    i2t = _metric_samples(ranks.image_to_text, np.arange(images), weights)
    t2i = _metric_samples(ranks.text_to_image, caption_image, weights)
    return RetrievalMetrics(
        images,
        captions,
        {name: percentile_interval(samples, units, _bounds(name)) for name, samples in i2t.items()},
        {name: percentile_interval(samples, units, _bounds(name)) for name, samples in t2i.items()},
        percentile_interval(_rsum(i2t, t2i), units, (0.0, 600.0)),
        ranks,
    )


def _bounds(name: str) -> tuple[float, float] | None:
    """Between which a figure lies: shares, and not ranks."""
    return None if name.endswith("rank") else (0.0, 1.0)


def chance_metrics(ranks: PositiveRanks) -> dict[str, Any]:
    """What a random ranking of this gallery finds on average, with the positives that each query has.

    Args:
        ranks: Ranks of the gallery, of which only the number of positives per query counts.

    Returns:
        {"image_to_text": {"recall_at_1": share, ...}, "text_to_image": {...}, "rsum": 0 to 600}.
    """
    result: dict[str, Any] = {}
    images = len(ranks.image_to_text) + ranks.distractors
    for way, gallery in (("image_to_text", len(ranks.text_to_image)), ("text_to_image", images)):
        positive_counts = (getattr(ranks, way) > 0).sum(axis=1)
        result[way] = {f"recall_at_{k}": float(chance_recall(positive_counts, gallery, k).mean()) for k in RECALL_AT}
    result["rsum"] = 100.0 * sum(sum(result[way].values()) for way in ("image_to_text", "text_to_image"))
    return result


def rsum_gain(
    ranks: PositiveRanks, baseline: PositiveRanks, caption_image: np.ndarray, resamples: int = RESAMPLES, seed: int = 0,
    unit: np.ndarray | None = None,
) -> MetricEstimate:  # fmt: skip
    """The gain in rsum from one ranking of a gallery to another, with a paired bootstrap over images.

    Args:
        ranks: The ranks to compare.
        baseline: The ranks of the same gallery that they are compared with.
        caption_image: (M,) index of each caption's image.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.
        unit: (N,) units that are drawn together, as in `metrics_of_ranks`; None draws images.

    Returns:
        The difference in rsum, with its interval.
    """
    weights, units = _resampled(len(ranks.image_to_text), resamples, seed, unit)
    sums = []
    for compared in (ranks, baseline):
        i2t = _metric_samples(compared.image_to_text, np.arange(len(compared.image_to_text)), weights)
        sums.append(_rsum(i2t, _metric_samples(compared.text_to_image, caption_image, weights)))
    return percentile_interval(sums[0] - sums[1], units, (-600.0, 600.0))


def _rsum(i2t: dict[str, np.ndarray], t2i: dict[str, np.ndarray]) -> np.ndarray:
    return 100.0 * np.sum([samples[f"recall_at_{k}"] for samples in (i2t, t2i) for k in RECALL_AT], axis=0)


def _resampled(images: int, resamples: int, seed: int, unit: np.ndarray | None) -> tuple[np.ndarray, int]:
    """How often each image is drawn (1 + resamples, N), those of a unit together; and of how many units."""
    units = images if unit is None else int(unit.max()) + 1
    weights = bootstrap_weights(units, resamples if units >= MIN_IMAGES else 0, seed)
    return (weights if unit is None else weights[:, unit]), units


def bootstrap_weights(images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image is drawn in every resample.

    Args:
        images: Number N of images.
        resamples: Number of resamples.
        seed: Seed of the draws.

    Returns:
        (1 + resamples, N) float32; the first row, all ones, is the data as it is.
    """
    weights = np.ones((1 + resamples, images), dtype=np.float32)
    if resamples:
        weights[1:] = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    return weights


def _metric_samples(ranks: np.ndarray, image: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each figure on the data and on every resample (1 + resamples,). image: (Q,) which image a query is drawn with."""
    best_rank = ranks[:, 0]
    images = weights.shape[1]
    queries = weights @ np.bincount(image, minlength=images)

    def mean(values: np.ndarray) -> np.ndarray:
        return (weights @ np.bincount(image, weights=values, minlength=images)) / queries

    samples = {f"recall_at_{k}": mean(best_rank <= k) for k in RECALL_AT}
    samples["median_rank"] = _median(best_rank, image, weights)
    samples["mean_rank"] = mean(best_rank)
    samples["map"] = mean(average_precision(ranks))
    samples["map_at_r"] = mean(average_precision_at_r(ranks))
    return samples


def _median(best_rank: np.ndarray, image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The median of the queries' ranks in every resample, some resamples at a time."""
    values, cumulated_of = _cumulative_counts(best_rank, image, weights.shape[1])
    medians = np.empty(len(weights))
    step = max(1, (1 << 23) // len(values))
    for start in range(0, len(weights), step):
        cumulated = cumulated_of(weights[start : start + step])
        total = cumulated[:, -1]
        # The lower and the upper middle: positions (n - 1) // 2 and n // 2, counted from 0.
        low = (cumulated <= np.floor((total - 1) / 2)[:, None]).sum(axis=1)
        high = (cumulated <= np.floor(total / 2)[:, None]).sum(axis=1)
        medians[start : start + step] = (values[low] + values[high]) / 2
    return medians


#: Entries of a table of images and ranks that `_cumulative_counts` may make: 64 MiB with what it takes to make it.
_MAX_TABLE_ENTRIES = 1 << 22


def _cumulative_counts(
    best_rank: np.ndarray, image: np.ndarray, images: int
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Ranks in order (U,), and a function of resamples (R, N): how many queries have a rank up to each of them (R, U).

    Where few ranks differ they are counted together, by a product; else query after query.
    """
    values, inverse = np.unique(best_rank, return_inverse=True)
    if images * len(values) > _MAX_TABLE_ENTRIES:
        order = np.argsort(best_rank, kind="stable")
        owners = image[order]
        return best_rank[order], lambda weights: np.cumsum(weights[:, owners], axis=1, dtype=np.float64)
    # Whole numbers, exact in float32 below 2^24.
    table = np.bincount(image * len(values) + inverse, minlength=images * len(values))
    up_to = table.reshape(-1, len(values)).cumsum(axis=1).astype(np.float32 if len(best_rank) < 1 << 22 else np.float64)
    return values, lambda weights: weights @ up_to


def percentile_interval(samples: np.ndarray, units: int, bounds: tuple[float, float] | None) -> MetricEstimate:
    """Return a figure with the 95% percentile interval of its resamples.

    Where they are all alike, as no two images differ, the interval is what a share of images that was not seen could
    change of a figure within `bounds`.

    Args:
        samples: (1 + R,) the figure on the data, and on each resample.
        units: Number of units that were drawn.
        bounds: Lowest and highest value of the figure; None for one without.

    Returns:
        The figure; without an interval where nothing was resampled, or where all resamples are alike and it has no
        bounds.
    """
    value = float(samples[0])
    if len(samples) == 1:
        return MetricEstimate(value)
    low, high = (float(end) for end in np.percentile(samples[1:], [2.5, 97.5]))
    # Equal but for the rounding of their sums.
    if np.ptp(samples) > 1e-5 * max(1.0, abs(value)):
        return MetricEstimate(value, low, high)
    if bounds is None:
        return MetricEstimate(value)
    unseen = unseen_share(units)
    return MetricEstimate(value, value - unseen * (value - bounds[0]), value + unseen * (bounds[1] - value))


def unseen_share(images: int, level: float = SIGNIFICANCE_LEVEL) -> float:
    """The largest share of images of which a sample may well contain none.

    It is the upper end of the interval of a share of which N images show none.

    Args:
        images: Number N of images in the sample.
        level: Of the interval.

    Returns:
        1 - (level / 2)^(1 / N).

    Source: Clopper and Pearson, Biometrika 26 (1934).

    >>> round(unseen_share(40), 3)
    0.088
    """
    return float(1 - (level / 2) ** (1 / images))
