"""What may be said of variants over seeds: means with intervals, differences, and which of them are shown.

Two things are drawn at random in a study: the pictures that the gallery happens to hold, and the seeds of the
trainings. A figure of S seeds on N pictures is a table (S, N), what each picture brings to it in each run, and an
interval has to count both: a hundred thousand pictures do not make up for two seeds. With both as random effects,
crossed, the variance of the mean is (MS pictures + MS seeds - MS rest) / (S N), and Satterthwaite's degrees of freedom
give the quantile; where seeds differ no more than the rest does, they add nothing. One seed alone says nothing of the
seeds: its interval is of the pictures only, and is marked so (no spread).

Sources: Dorfman, Berbaum and Metz, Investigative Radiology 27 (1992), for readers and cases both at random;
Satterthwaite, Biometrics Bulletin 2 (1946); Holm, Scandinavian Journal of Statistics 6 (1979), for many comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np

from clipvisionalign.retrieval.metrics import RECALL_AT, average_precision
from clipvisionalign.retrieval.ranks import PartnerRanks

#: What is compared between variants, in this order.
FIGURES = ("rsum", *(f"{way} recall_at_{k}" for way in ("image_to_text", "text_to_image") for k in RECALL_AT))

LEVEL = 0.05


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95% interval. spread: standard deviation between seeds, None for one seed. p: of its
    being zero, two-sided."""

    value: float
    low: float
    high: float
    spread: float | None
    p: float

    def to_dict(self) -> dict[str, float | None]:
        """What report.json holds."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """a - b in one figure; p_holm: p corrected for all comparisons of its family; shown: whether that is below 5%."""

    a: str
    b: str
    figure: str
    estimate: Estimate
    p_holm: float

    @property
    def shown(self) -> bool:
        return self.p_holm < LEVEL

    def to_dict(self) -> dict[str, object]:
        """What report.json holds."""
        about = {"a": self.a, "b": self.b, "figure": self.figure}
        return {**about, **self.estimate.to_dict(), "p_holm": self.p_holm, "shown": self.shown}


def shares(ranks: PartnerRanks, caption_image: np.ndarray, figure: str) -> np.ndarray:
    """What each image brings to a figure (N,): the mean is the figure itself, in percent (rsum: 0 to 600).

    Captions are counted with their image. Where images have unequal numbers of captions a recall of captions is a ratio
    of two sums, here in its linear part, so that the variance is that of the ratio.
    """
    if figure == "rsum":
        return np.sum([shares(ranks, caption_image, name) for name in FIGURES if name != "rsum"], axis=0)
    way, name = figure.split(" ")
    of = getattr(ranks, way)
    found = average_precision(of) if name == "map" else of[:, 0] <= int(name.rpartition("_")[2])
    if way == "image_to_text":
        return 100.0 * found
    return ratio_shares(found.astype(np.float64), caption_image, len(ranks.image_to_text))


def ratio_shares(found: np.ndarray, image: np.ndarray, images: int) -> np.ndarray:
    """What each of N images brings to the percentage of queries that are found. found, image: (Q,) -> (N,)."""
    number = np.bincount(image, minlength=images)
    mean = found.mean()
    hits = np.bincount(image, weights=found, minlength=images)
    return 100.0 * (mean + (hits - mean * number) * images / len(found))


def estimate(table: np.ndarray, bounds: tuple[float, float] = (-np.inf, np.inf)) -> Estimate:
    """The mean of (S, N), or of a difference of two such, with both seeds and pictures at random.

    bounds: between which the figure lies by its nature; the interval does not reach beyond. Raises ValueError for fewer
    than two pictures.
    """
    from scipy.stats import t as student

    seeds, images = table.shape
    if images < 2:
        raise ValueError(f"an interval needs at least 2 images, not {images}")
    value = float(table.mean())
    by_image, by_seed = table.mean(axis=0), table.mean(axis=1)
    ms_image = seeds * float(by_image.var(ddof=1))
    variance, freedom = ms_image / (seeds * images), float(images - 1)
    if seeds > 1:
        rest = table - by_image - by_seed[:, None] + value
        ms_seed = images * float(by_seed.var(ddof=1))
        ms_rest = float((rest**2).sum()) / ((seeds - 1) * (images - 1))
        if ms_seed > ms_rest:
            total = ms_image + ms_seed - ms_rest
            each = ms_image**2 / (images - 1) + ms_seed**2 / (seeds - 1) + ms_rest**2 / ((seeds - 1) * (images - 1))
            variance, freedom = total / (seeds * images), total**2 / each
    deviation = float(np.sqrt(variance))
    if not deviation:
        return Estimate(value, value, value, 0.0 if seeds > 1 else None, 1.0 if not value else 0.0)
    reach = float(student.ppf(1 - LEVEL / 2, freedom)) * deviation
    p = float(2 * student.sf(abs(value) / deviation, freedom))
    low, high = max(value - reach, bounds[0]), min(value + reach, bounds[1])
    return Estimate(value, low, high, float(by_seed.std(ddof=1)) if seeds > 1 else None, p)


def bounds_of(figure: str) -> tuple[float, float]:
    """Between which a figure lies: percent, or rsum."""
    return (0.0, 600.0) if figure == "rsum" else (0.0, 100.0)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction of p values, in their order."""
    order = np.argsort(p)
    corrected, highest = np.empty(len(p)), 0.0
    for place, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - place) * p[index]))
        corrected[index] = highest
    return corrected.tolist()


def differences(family: dict[str, dict[str, np.ndarray]]) -> list[Difference]:
    """Every two variants in every figure of a family: on the same pictures, seed by seed as far as both have them.

    family: figure -> variant -> (S, N). p is corrected over the whole family.
    """
    found: list[tuple[str, str, str, Estimate]] = []
    for figure, tables in family.items():
        for a, b in combinations(tables, 2):
            seeds = min(len(tables[a]), len(tables[b]))
            most = bounds_of(figure)[1]
            found.append((a, b, figure, estimate(tables[a][:seeds] - tables[b][:seeds], (-most, most))))
    corrected = holm([each.p for *_, each in found])
    return [Difference(*each, p) for each, p in zip(found, corrected, strict=True)]
