"""Which first hits of a query are worth re-ranking: those whose cosines lie within a calibrated margin of the best.

Pair scores cost a hundred times what a cosine does. Where the first hit leads by far, they change nothing; where many
hits are close, they decide. On captioned images that the model was not trained on, all first hits are re-ranked once;
of that follows what each margin would have cost, and would have found. The margin that is kept is the smallest that
loses next to nothing against the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

#: Hits of a query that are re-ranked at most.
MARGIN_DEPTH = 32
#: Recall at 1, 5 and 10, added up in percent, that the chosen margin may lose against the best one.
MARGIN_LOSS = 0.25
#: Margins that are measured between none and all hits.
_STEPS = 24
_RANKS = (1, 5, 10)


class MarginRow(NamedTuple):
    """What one margin costs and finds.

    Attributes:
        margin: Distance of cosines.
        images: Mean number of images a query that are re-ranked.
        queries: Share of the queries of which any are.
        recall_sum: Recall at 1, 5 and 10 of captions to images, added up, in percent.
    """

    margin: float
    images: float
    queries: float
    recall_sum: float


@dataclass(frozen=True)
class RerankMargin:
    """The calibrated margin of a model that re-ranks.

    Attributes:
        margin: Hits whose cosine is below the first one's by no more than this are re-ranked.
        depth: Number of first hits among which that was measured, and up to which hits are re-ranked.
        curve: What other margins cost and find, in ascending order, from none to all hits of the depth.
    """

    margin: float
    depth: int
    curve: Sequence[MarginRow] = ()

    def to_dict(self) -> dict[str, Any]:
        """The margin as JSON.

        Returns:
            Its fields.
        """
        return asdict(self) | {"curve": [row._asdict() for row in self.curve]}

    @classmethod
    def from_dict(cls, fields: Any) -> RerankMargin:
        """Read what `to_dict` gives.

        Args:
            fields: The fields.

        Returns:
            The margin.

        Raises:
            ValueError: The margin is negative or no number, or the depth is below 2.
            KeyError: A field is missing.
            TypeError: A field is of another type.
        """
        margin, depth = float(fields["margin"]), int(fields["depth"])
        if not 0.0 <= margin < math.inf or depth < 2:
            raise ValueError(f"a margin of {margin} among {depth} hits")
        return cls(margin, depth, [MarginRow(**{name: float(row[name]) for name in MarginRow._fields})
                                   for row in fields["curve"]])  # fmt: skip


def unsure_hits(cosines: Sequence[float], margin: float, depth: int = MARGIN_DEPTH) -> int:
    """Number of first hits whose order the cosines leave unsure.

    Args:
        cosines: Of a query's hits, best first.
        margin: The calibrated margin; 0 where re-ranking brings nothing.
        depth: Number of hits at most.

    Returns:
        The number; 0 where the first hit leads by more than the margin.

    >>> unsure_hits([0.41, 0.40, 0.38, 0.20], 0.05), unsure_hits([0.41, 0.30], 0.05)
    (3, 0)
    """
    if margin <= 0.0 or not cosines:
        return 0
    close = sum(cosines[0] - cosine <= margin for cosine in cosines[:depth])
    return close if close > 1 else 0


def measure_margins(cosines: np.ndarray, pair_scores: np.ndarray, own: np.ndarray) -> RerankMargin:
    """What margins cost and find, and the smallest that loses next to nothing.

    Args:
        cosines: (M, K) of each caption's first K images, best first.
        pair_scores: (M, K) of the same pairs.
        own: (M,) position of the caption's own image among them, from 0; K where it is not there.

    Returns:
        The margin with its curve.

    Raises:
        ValueError: There are no captions, or fewer than 2 images.
    """
    count, depth = cosines.shape
    if not count or depth < 2:
        raise ValueError(f"{count} captions with {depth} first images: nothing to re-rank")
    lead = cosines[:, :1] - cosines
    quantiles = np.quantile(lead[:, 1:], np.linspace(0.0, 1.0, _STEPS))
    # Rounded up, so that what is written re-ranks the same hits.
    margins = [0.0, *np.unique(np.ceil(np.maximum(quantiles, 0.0) * 1e6) / 1e6).tolist()]
    rows = [_margin_row(margin, cosines, pair_scores, own) for margin in dict.fromkeys(margins)]
    best = max(row.recall_sum for row in rows)
    chosen = next(row for row in rows if row.recall_sum >= best - MARGIN_LOSS)
    return RerankMargin(chosen.margin, depth, rows)


def count_unsure(cosines: np.ndarray, margin: float) -> np.ndarray:
    """`unsure_hits` of many queries.

    Args:
        cosines: (M, K) of each query's first K images, best first.
        margin: The margin.

    Returns:
        (M,) numbers of hits.

    >>> count_unsure(np.array([[0.5, 0.45, 0.1], [0.5, 0.3, 0.2]]), 0.1).tolist()
    [2, 0]
    """
    counts = ((cosines[:, :1] - cosines <= margin) & (margin > 0.0)).sum(axis=1)
    counts[counts < 2] = 0
    return counts


def reranked_positions(pair_scores: np.ndarray, own: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Where own images stand once the first hits are ordered by their pair scores.

    Args:
        pair_scores: (M, K) of each query's first K images, in the order of their cosines.
        own: (M,) position of the query's own image among them, from 0; K where it is not there.
        counts: (M,) number of first hits that are re-ranked.

    Returns:
        (M,) positions; of equal scores the own image's is the last.

    >>> reranked_positions(np.array([[1.0, 2.0, 9.0]]), np.array([1]), np.array([2])).tolist()
    [0]
    """
    depth = pair_scores.shape[1]
    # The own image is re-ranked where it is among the first of the hits.
    own_scores = np.take_along_axis(pair_scores, np.minimum(own, depth - 1)[:, None], axis=1)
    is_reranked = np.arange(depth) < counts[:, None]
    # A tie counts against the own image, which itself is one of those that reach its score.
    above = ((pair_scores >= own_scores) & is_reranked).sum(axis=1) - 1
    return np.where(own < counts, above, own)


def recall_contributions(positions: np.ndarray, depth: int) -> np.ndarray:
    """What each query adds to the sum of recall at 1, 5 and 10.

    Args:
        positions: (M,) of the own images, from 0; `depth` for one that is not among the first hits.
        depth: Number of first hits.

    Returns:
        (M,) in percent: their mean is the sum of the recalls.

    >>> recall_contributions(np.array([0, 3, 8, 32]), 32).tolist()
    [300.0, 200.0, 100.0, 0.0]
    """
    return np.asarray(sum(100.0 * ((positions < k) & (positions < depth)) for k in _RANKS))


def _margin_row(margin: float, cosines: np.ndarray, pair_scores: np.ndarray, own: np.ndarray) -> MarginRow:
    counts = count_unsure(cosines, margin)
    contributions = recall_contributions(reranked_positions(pair_scores, own, counts), cosines.shape[1])
    return MarginRow(margin, float(counts.mean()), float((counts > 0).mean()), float(contributions.mean()))
