"""Captions in three parts by their number of words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipvisionalign.study.documents import LengthTerciles
from clipvisionalign.study.results_check import TERCILES


def length_terciles(captions: Sequence[str]) -> LengthTerciles:
    """The data's own captions in three parts by their number of words.

    They are cut between two lengths where that is nearest to a third: captions of one length stand in one part. There
    are two parts, or one ("all"), where there are no three lengths.

    Args:
        captions: (M,) captions.

    Returns:
        "inside": (M,) bool by part; "words": from and to.

    >>> length_terciles(["a", "a b", "a b", "a b c", "a b c d"])["words"]
    {'short': [1, 1], 'middle': [2, 2], 'long': [3, 4]}
    """
    word_counts = np.array([len(caption.split()) for caption in captions])
    lengths, counts = np.unique(word_counts, return_counts=True)
    names = {1: ("all",), 2: (TERCILES[0], TERCILES[2])}.get(len(lengths), TERCILES)
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    cuts = [0]
    for index in range(1, len(names)):
        # Each part that is still to come has one length at least.
        candidates = range(cuts[-1] + 1, len(lengths) - len(names) + index + 1)
        cuts.append(min(candidates, key=lambda cut: abs(cumulative[cut] - len(word_counts) * index / len(names))))
    spans = {
        name: [int(lengths[start]), int(lengths[end - 1])]
        for name, start, end in zip(names, cuts, [*cuts[1:], len(lengths)], strict=True)
    }
    return {
        "inside": {name: (low <= word_counts) & (word_counts <= high) for name, (low, high) in spans.items()},
        "words": spans,
    }
