"""Measures of single queries: average precision, and the recall that is expected of a random ranking.

Sources: Musgrave, Belongie and Lim, arXiv:2003.08505, for mAP@R; Zheng et al., "Scalable Person Re-identification",
ICCV 2015, for mAP.
"""

from __future__ import annotations

import numpy as np


def chance_recall(positive_counts: np.ndarray, gallery: int, k: int) -> np.ndarray:
    """Expected recall of each query in a gallery in random order.

    A draw without replacement: 1 - C(n - r, k) / C(n, k) for r positives.

    Args:
        positive_counts: (Q,) number of each query's positives in the gallery.
        gallery: Number n of candidates.
        k: Number of first results.

    Returns:
        (Q,) probability that one of its positives is among the first k.

    >>> chance_recall(np.array([1, 2]), 4, 2)
    array([0.5       , 0.83333333])
    """
    misses = np.ones(len(positive_counts))
    for rank in range(min(k, gallery)):
        misses *= np.clip((gallery - positive_counts - rank) / (gallery - rank), 0.0, 1.0)
    return 1.0 - misses


def average_precision(ranks: np.ndarray) -> np.ndarray:
    """Average precision of each query over the whole gallery.

    Args:
        ranks: (Q, R) ranks of its positives from 1, in ascending order, padded with 0.

    Returns:
        (Q,) from 0 to 1.

    >>> average_precision(np.array([[1, 2], [2, 0]]))
    array([1. , 0.5])
    """
    valid = ranks > 0
    precision = np.arange(1, ranks.shape[1] + 1) / np.maximum(ranks, 1)
    return (precision * valid).sum(axis=1) / valid.sum(axis=1)


def average_precision_at_r(ranks: np.ndarray) -> np.ndarray:
    """Average precision of each query within its first R results, with R its number of positives (mAP@R).

    Args:
        ranks: (Q, R) ranks of its positives from 1, in ascending order, padded with 0.

    Returns:
        (Q,) from 0 to 1.

    Source: Musgrave et al., "A Metric Learning Reality Check", arXiv:2003.08505.

    >>> average_precision_at_r(np.array([[1, 3], [1, 0]]))
    array([0.5, 1. ])
    """
    valid = ranks > 0
    positive_counts = valid.sum(axis=1, keepdims=True)
    within = valid & (ranks <= positive_counts)
    precision = np.arange(1, ranks.shape[1] + 1) / np.maximum(ranks, 1)
    return (precision * within).sum(axis=1) / positive_counts[:, 0]
