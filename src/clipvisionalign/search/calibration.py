"""A conformal cut-off by score: all hits that reach it hold what is meant with a given probability.

Images with their captions are calibrated on: the cosine of a caption with its own image is its conformity. The cut-off
of a level is a quantile of these, so that the own image of a caption of a further image reaches it with at least that
probability, for whatever model. It is one of score and not of rank, so that it does not depend on the size of the
gallery. Cosines standardised by each query's own distribution gave answers as long at the same coverage
(`benchmarks/promise.py`), and hits to queries that fit nothing; cosines as they are give those none.

Captions of one image are not independent: the image with its captions is the unit, and each of its captions weighs as
one of them. The promise holds for images and captions that are exchangeable with those: of a like collection.

Sources: Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World" (2005); Lee, Barber and Willett,
"Distribution-free inference with hierarchical data", arXiv:2306.06342, eq. 5, for groups of several.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clipvisionalign.search.rerank_margin import RerankMargin

#: The file of a run folder and of an index that has it.
CALIBRATION_FILE = "calibration.json"
CALIBRATION_FORMAT = 1
#: Levels that are reported, and the one that is marked where none is asked for.
LEVELS, DEFAULT_LEVEL = (0.8, 0.9, 0.95), 0.9
#: Units that have to miss a cut-off, at least, for it to be given: with n units the share that is kept differs from the
#: level by about sqrt(level * (1 - level) / n), which is 4 points for 50 units at 0.9, and 2 for 100 at 0.95.
MISSES_NEEDED = 5
#: Levels whose cut-offs are kept.
MAX_KEPT_LEVELS = 64


class UncalibratedError(ValueError):
    """A promise that cannot be given."""


def check_level(level: float) -> float:
    """Check a level.

    Args:
        level: The probability that is asked for.

    Returns:
        The same.

    Raises:
        ValueError: It is not between 0 and 1.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"a promise of {level:g}: give a probability between 0 and 1, such as 0.9")
    return level


def units_needed(level: float) -> int:
    """Number of units that a level needs.

    Args:
        level: The probability.

    Returns:
        The number of images, or of judged queries.

    >>> [units_needed(level) for level in (0.8, 0.9, 0.95)]
    [25, 50, 100]
    """
    return math.ceil(round(MISSES_NEEDED / (1.0 - check_level(level)), 6))


def conformal_threshold(scores: np.ndarray, units: np.ndarray, level: float) -> float:
    """The cut-off that a further unit's score reaches with a given probability.

    Args:
        scores: (M,) conformity scores.
        units: (M,) the number of the unit of each, such as of the image of a caption.
        level: The probability.

    Returns:
        The cut-off; -inf where there are too few units for any.

    >>> scores = np.arange(1.0, 20.0)
    >>> conformal_threshold(scores, np.arange(19), 0.9), conformal_threshold(scores[:8], np.arange(8), 0.9)
    (2.0, -inf)
    """
    _, unit, sizes = np.unique(units, return_inverse=True, return_counts=True)
    order = np.argsort(-scores, kind="stable")
    mass = np.cumsum(1.0 / sizes[unit[order]]) / (len(sizes) + 1)
    reached = np.flatnonzero(mass >= check_level(level) - 1e-9)
    return float(scores[order][reached[0]]) if len(reached) else -math.inf


@dataclass(frozen=True)
class Calibration:
    """What the cut-offs of a model, or of an index, are computed from.

    Attributes:
        scores: (M,) cosine of each caption with its image.
        units: (M,) the number of each caption's image; of judged queries, of each image's query.
        aligner: Fingerprint of the model, `manifest.aligner_fingerprint`.
        calibrated_on: What it was calibrated on: "data", "split", "images", "captions", "hash", and what was left out;
            or "judged", "queries" and "images".
        measured: For each of `LEVELS` what was measured by cross-fitting on the same data.
        best: For numbers of images, ascending: the cosine that the best hit of all but 1 % of the captions surpasses in
            galleries of so many images with their own among them.
        rerank: Which first hits are worth re-ranking; None for a model that does not, and in files of before.
    """

    scores: np.ndarray
    units: np.ndarray
    aligner: str = ""
    calibrated_on: dict[str, Any] = field(default_factory=dict)
    measured: Sequence[dict[str, Any]] = ()
    best: Sequence[tuple[int, float]] = ()
    rerank: RerankMargin | None = None

    @cached_property
    def count(self) -> int:
        """Number of units."""
        return len(np.unique(self.units))

    @property
    def unit_noun(self) -> str:
        """What a unit is: "image" or "judged query"."""
        return "judged query" if "judged" in self.calibrated_on else "image"

    def threshold(self, level: float) -> float:
        """The cut-off of a level.

        Args:
            level: The probability that what is meant reaches it.

        Returns:
            The cosine with a query from which on an image is in its answer.

        Raises:
            UncalibratedError: There are too few units for this level.
            ValueError: The level is not between 0 and 1.
        """
        needed = units_needed(level)
        if self.count < needed:
            nouns = "judged queries" if self.unit_noun == "judged query" else "images"
            raise UncalibratedError(
                f"a promise of {level:g} needs {needed:,} {nouns} to calibrate on; there are {self.count:,}"
            )
        cut = self._thresholds.get(level)
        if cut is None:
            cut = conformal_threshold(self.scores, self.units, level)
            if len(self._thresholds) < MAX_KEPT_LEVELS:
                self._thresholds[level] = cut
        return cut

    @cached_property
    def _thresholds(self) -> dict[float, float]:
        # Each search asks for one, of few levels; the service takes any.
        return {}

    def chance_level(self, count: int) -> float:
        """The cosine that the best hit of hardly any caption fails to surpass, where its image is there.

        Args:
            count: Number of images that are searched.

        Returns:
            The cosine, of the largest number of images up to this that is known; -inf for fewer.
        """
        return max((cosine for images, cosine in self.best if images <= count), default=-math.inf)

    def describe(self) -> str:
        """What it was calibrated on, in a few words.

        Returns:
            Such as "flickr8k, dev: 500 images, 2,500 captions".
        """
        about = self.calibrated_on
        if "judged" in about:
            return f"{about['judged']}: {self.count:,} judged queries"
        split = f", {about['split']}" if about.get("split") else ""
        return f"{about.get('data', 'unknown data')}{split}: {self.count:,} images, {len(self.scores):,} captions"

    def to_json(self) -> str:
        """The calibration as the text of its file.

        Returns:
            JSON; scores in the order of their units.
        """
        order = np.argsort(self.units, kind="stable")
        sizes = np.unique(self.units, return_counts=True)[1]
        fields = {
            "format": CALIBRATION_FORMAT, "aligner": self.aligner, "calibrated_on": self.calibrated_on,
            "measured": list(self.measured), "best": [list(each) for each in self.best],
            "scores": encode_array(self.scores[order]), "scores_per_unit": encode_array(sizes),
        }  # fmt: skip
        if self.rerank is not None:
            fields["rerank"] = self.rerank.to_dict()
        return json.dumps(fields, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, location: str | Path = CALIBRATION_FILE) -> Calibration:
        """Read what `to_json` gives.

        Args:
            text: The text.
            location: The file, for the message of an error.

        Returns:
            The calibration.

        Raises:
            UncalibratedError: It cannot be read.
        """
        try:
            return _parse(json.loads(text))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise UncalibratedError(
                f"{location}: cannot be read ({reason}); calibrate again with --overwrite"
            ) from None


def _parse(fields: dict[str, Any]) -> Calibration:
    """A calibration by the fields of its file. Raises ValueError, KeyError or TypeError for others."""
    if fields["format"] != CALIBRATION_FORMAT:
        raise ValueError(f"format {fields['format']}, not {CALIBRATION_FORMAT}")
    scores = decode_array(fields["scores"])
    sizes = decode_array(fields["scores_per_unit"]).astype(np.int64)
    if (sizes < 1).any() or sizes.sum() != len(scores):
        raise ValueError(f"{len(scores):,} scores, of {int(sizes.sum()):,} captions")
    best = [(int(images), float(cosine)) for images, cosine in fields["best"]]
    about, measured = dict(fields["calibrated_on"]), list(fields["measured"])
    units, rerank = np.repeat(np.arange(len(sizes)), sizes), fields.get("rerank")
    margin = None if rerank is None else RerankMargin.from_dict(rerank)
    return Calibration(scores, units, str(fields["aligner"]), about, measured, best, margin)


def encode_array(values: np.ndarray) -> str:
    """Numbers as a string of JSON.

    Args:
        values: A one-dimensional array.

    Returns:
        Its values as little-endian float32, in base64.
    """
    return base64.b64encode(np.ascontiguousarray(values, dtype="<f4").tobytes()).decode("ascii")


def decode_array(text: str) -> np.ndarray:
    """Read what `encode_array` gives.

    Args:
        text: The string.

    Returns:
        The values, float32.

    Raises:
        ValueError: It is no such string, or holds a value that is not finite.
    """
    data = base64.b64decode(text, validate=True)
    if len(data) % 4:
        raise ValueError("an array that ends within a number")
    values = np.frombuffer(data, dtype="<f4").astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("an array with values that are not finite")
    return values
