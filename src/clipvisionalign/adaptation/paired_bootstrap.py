"""Differences and shares of models on the same images, both from one paired bootstrap.

Every resample draws the same images for all models: whether a difference lies above 0 and whether the share lies above
1 is then the same question, and both intervals answer it alike, on a gallery of ten images too. On few images the
percentiles of a bootstrap are too near to each other; they are taken further out, as far as Student's quantile is
beyond the normal one.

Sources: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), for the percentile interval; Hesterberg, The
American Statistician 69 (2015), for its expansion on few images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from clipvisionalign.retrieval.metrics import MIN_IMAGES, SIGNIFICANCE_LEVEL, bootstrap_weights, unseen_share

#: rsum lies between 0 and this.
_MAX_RSUM = 600.0
#: Images drawn in all resamples together; so many resamples, but not fewer or more than these.
_DRAWS, _MIN_RESAMPLES, _MAX_RESAMPLES = 10_000_000, 2_000, 10_000


@dataclass(frozen=True)
class PairedSamples:
    """The rsum of models on one gallery, and on resamples of its images.

    Attributes:
        tables: By model (U,) what each of U images, or identities, contributes to rsum; the mean is rsum.
        samples: By model (R,) rsum of each resample, the same images for all models; empty where there are fewer than
            `MIN_IMAGES`.
    """

    tables: Mapping[str, np.ndarray]
    samples: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, tables: Mapping[str, np.ndarray], seed: int = 0) -> PairedSamples:
        """Draw the resamples.

        Args:
            tables: By model (U,) contributions to rsum, at least one model.
            seed: Seed of the draws.

        Returns:
            The figures with their resamples.

        >>> paired = PairedSamples.of({"run": np.arange(10.0) + 2, "base": np.arange(10.0)})
        >>> paired.difference("run", "base")["value"], round(paired.share("run", "base")["value"], 3)
        (2.0, 1.444)
        """
        table = np.stack(list(tables.values()))
        units = table.shape[1]
        samples = np.empty((len(table), 0))
        if units >= MIN_IMAGES:
            resamples = int(np.clip(_DRAWS // units, _MIN_RESAMPLES, _MAX_RESAMPLES))
            samples = table @ bootstrap_weights(units, resamples, seed)[1:].T / units
            # What differs by rounding is equal; an rsum of zero is a share of nothing.
            samples = np.maximum(samples.round(9), 1e-9)
        return cls(tables, dict(zip(tables, samples, strict=True)))

    def difference(self, model: str, other: str) -> dict[str, float | None]:
        """The rsum of one model minus that of another.

        Args:
            model: A name in `tables`.
            other: Another one.

        Returns:
            "value", and "low", "high" of its 95% interval, with the two-sided "p", which is below 0.05 where the
            interval leaves 0 out; these are None for fewer than `MIN_IMAGES` images.
        """
        difference = self.tables[model] - self.tables[other]
        value, units = float(difference.mean()), len(difference)
        if units < MIN_IMAGES:
            return {"value": value, "low": None, "high": None, "p": None}
        if _is_constant(difference):
            unseen = unseen_share(units)
            # The share of images at the far end with which the mean would be zero (`study.statistics.estimate`).
            p = 2 * (_MAX_RSUM / (_MAX_RSUM + abs(value))) ** units if value else 1.0
            low, high = value - unseen * (value + _MAX_RSUM), value + unseen * (_MAX_RSUM - value)
        else:
            samples = self.samples[model] - self.samples[other]
            low, high = _interval(samples, units)
            p = _p_value(samples, units)
        return {"value": value, "low": low, "high": high, "p": min(max(p, 2.0 ** (1 - units)), 1.0)}

    def share(self, model: str, base: str) -> dict[str, float | None]:
        """The rsum of a model as a share of a base's.

        Args:
            model: A name in `tables`.
            base: Another one.

        Returns:
            "value", and "low", "high" of its 95% interval, above 1 or below 1 where that of the difference is above 0
            or below 0; None for fewer than `MIN_IMAGES` images. All are None where the base has an rsum of 0.
        """
        own, of_base = float(self.tables[model].mean()), float(self.tables[base].mean())
        units = len(self.tables[base])
        if of_base <= 0:
            return {"value": None, "low": None, "high": None}
        if units < MIN_IMAGES:
            return {"value": own / of_base, "low": None, "high": None}
        if model != base and _is_constant(self.tables[model] - self.tables[base]):
            seen, unseen = 1 - unseen_share(units), unseen_share(units) * _MAX_RSUM
            low, high = seen * own / (seen * of_base + unseen), (seen * own + unseen) / (seen * of_base)
        else:
            low, high = _interval(self.samples[model] / self.samples[base], units)
        return {"value": own / of_base, "low": low, "high": high}


def _is_constant(difference: np.ndarray) -> bool:
    """Whether no two images differ; a variance that is rounding and nothing else is none."""
    return bool(difference.var() <= (1e-9 * max(np.abs(difference).max(), 1e-9)) ** 2)


def _expansion(units: int) -> float:
    """By how much the variance of a resample's mean falls short of that of a mean, as a factor of its root."""
    return math.sqrt(units / (units - 1))


def _interval(samples: np.ndarray, units: int) -> tuple[float, float]:
    """The 95% interval of a figure from its resamples (R,): two of these, none of which is interpolated."""
    from scipy.special import ndtr, stdtrit

    tail = float(ndtr(_expansion(units) * stdtrit(units - 1, SIGNIFICANCE_LEVEL / 2)))
    position = max(math.floor(tail * (len(samples) + 1)), 1) - 1
    ordered = np.sort(samples)
    return float(ordered[position]), float(ordered[-1 - position])


def _p_value(samples: np.ndarray, units: int) -> float:
    """The level at which the interval of `_interval` ends at zero."""
    from scipy.special import ndtri, stdtr

    beyond = 1 + min(int((samples <= 0).sum()), int((samples >= 0).sum()))
    tail = beyond / (len(samples) + 1)
    return float(2 * stdtr(units - 1, ndtri(min(tail, 0.5)) / _expansion(units)))
